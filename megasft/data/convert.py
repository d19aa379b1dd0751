"""Any file of conversations as one that every command reads as it stands: `megasft convert`.

What training reads directly goes through the same readers (`megasft.data.formats`), so a converted file trains the same
tokens. Here is what training has no room for: a format named by hand, a dataset of the Hub, and an account of what was
read, changed, left out and refused.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megasft.data import formats
from megasft.data.conversations import Problem, check_record
from megasft.data.formats import CLAIMING, FORMATS, NAMES
from megasft.data.formats.shape import Changes, without
from megasft.data.json_text import visible
from megasft.data.records import SUFFIXES, Block, conversation_files, parse_block, read_raw_blocks, recognize_block
from megasft.messages import UserError

FIRST_LINES = 3
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INSTALL_DATASETS = "pip install 'megasft[hub]'"


@dataclass
class Places:
    """How often something was met, and in which files and lines first. Line 0 stands for a file."""

    count: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)

    def add(self, file: str, line: int = 0) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < FIRST_LINES:
            self.first.append((file, line))


@dataclass
class Account:
    """What became of the records: counts, and the first places, of each format, change, key and reason."""

    output: Path
    read: int = 0
    written: int = 0
    files: int = 0
    formats: dict[str, Places] = field(default_factory=dict)
    changed: dict[str, Places] = field(default_factory=dict)
    kept: dict[str, Places] = field(default_factory=dict)
    left_out: dict[str, Places] = field(default_factory=dict)
    refused: dict[str, Places] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 if a record was refused."""
        return int(self.written < self.read or not self.written)

    @property
    def refused_file(self) -> Path:
        """Where all refused records are listed, if there are any."""
        return self.output.with_name(self.output.name + ".refused.txt")


@dataclass(frozen=True)
class Hub:
    """What to read of a dataset of the Hub."""

    split: str = "train"
    subset: str | None = None
    revision: str | None = None


def convert(
    source: str, output: Path, format: str = "", train_on: str = "last", drop: Iterable[str] = (), hub: Hub = Hub()
) -> Account:
    """Write a line for every record that is a conversation; those that are none are counted and listed.

    `output` appears when it is complete, and only if there is something in it.

    Args:
        source: a file or folder that `records` can read, or the name of a dataset on the Hub.
        format: one of `formats.NAMES`, or A+B/C for columns of text; by default what the first record looks like.
        train_on: for agent traces, `last` or `all`.
        drop: keys to leave out of records and of their messages.

    Raises:
        UserError: `source` cannot be read, its format is not known or cannot be trained on, `output` cannot be written.
    """
    if format and "/" not in format and format not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"--format {format}: not known; give one of {known}, or PROMPT/ANSWER with names of columns")
    if train_on not in ("all", "last"):
        raise UserError(f"--train-on {train_on}: give `all` or `last`")
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: name a .jsonl file to write")
    account = Account(output)
    blocks = _blocks(source, output, NAMES.get(format, format), account, hub)
    partial = output.with_name(output.name + ".partial")
    listed = output.with_name(output.name + ".refused.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8") as lines, listed.open("w", encoding="utf-8") as refused:
                for name, block, found in blocks:
                    for number, record, begin in parse_block(block):
                        line = _line(_made(record, found, train_on, drop), name, number, begin, account)
                        (refused if isinstance(line, Problem) else lines).write(f"{line}\n")
            if account.written:
                os.replace(partial, output)
            if account.read > account.written:
                os.replace(listed, account.refused_file)
            else:
                account.refused_file.unlink(missing_ok=True)
        finally:
            for path in (partial, listed):
                with contextlib.suppress(OSError):
                    path.unlink()
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    return account


def print_account(account: Account, console: Console | None = None) -> int:
    """Print the table; return the exit code."""
    console = console or Console()
    table = Table(show_header=False, title=Text(visible(str(account.output), 200)), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for title, places in account.formats.items():
        table.add_row("format", f"{places.count:,} file{'s' if places.count > 1 else ''}", title, _first(places))
    table.add_row("read", f"{account.read:,}")
    table.add_row("written", f"{account.written:,}")
    kept = {f"the key `{key}`, as it is": places for key, places in account.kept.items()}
    groups = {"changed": account.changed, "kept": kept, "left out": account.left_out, "refused": account.refused}
    for what, rows in groups.items():
        for reason, places in sorted(rows.items(), key=lambda row: -row[1].count):
            where = _first(places, one_file=account.files == 1)
            table.add_row(what, f"{places.count:,}", Text(visible(reason, 400)), where)
    console.print(table)
    if account.read > account.written:
        console.print(Text(f"all that were refused: {account.refused_file}"), soft_wrap=True)
    if any("ignore_keys" in reason for reason in account.refused):
        console.print("a key that says nothing to a model can also be left out here: --drop KEY", soft_wrap=True)
    if not account.written:
        console.print(Text(f"{account.output} was not written: there is no conversation"), soft_wrap=True)
    return account.exit_code


def _first(places: Places, one_file: bool = False) -> Text:
    more = ", ..." if places.count > len(places.first) else ""
    if one_file and places.first[0][1]:
        lines = ", ".join(f"{line:,}" for _, line in places.first)
        return Text(f"line{'s' if places.count > 1 else ''} {lines}{more}")
    shown = [visible(f"{file}:{line}" if line else file, 200) for file, line in places.first]
    return Text(", ".join(shown) + more)


# --- one record ------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What became of one record: what to write, or why there is nothing; and what was done on the way."""

    record: dict[str, Any] | str
    changes: Changes
    left_out: dict[str, str]  # key -> why


def _made(record: dict[str, Any] | str, format: str, train_on: str, drop: Iterable[str]) -> _Made:
    changes = Changes()
    if isinstance(record, str):
        return _Made(record, changes, {})
    made = formats.to_messages(record, format, changes, train_on)
    if isinstance(made, str):
        return _Made(made, changes, {})
    left_out = {key: "the key of another format" for key in CLAIMING if key in made}
    left_out |= {key: "--drop" for key in drop if key in made and key != "messages"}
    made = without(made, *left_out)
    messages = made.get("messages")
    if drop and isinstance(messages, list):
        held = {key for one in messages if isinstance(one, dict) for key in one} & set(drop) - {"role", "content"}
        left_out |= dict.fromkeys(held, "--drop")
        made["messages"] = [without(one, *held) if isinstance(one, dict) else one for one in messages]
    if record.get("messages") is not None and format not in ("messages", "hermes"):
        left_out["messages"] = "another format was asked for"
    bad = {key: value for key, value in made.items() if key not in ("messages", "tools") and not _is_json(value)}
    left_out |= {key: f"{type(value).__name__}: JSON has no form for it" for key, value in bad.items()}
    made = without(made, *bad)
    first = {key: made[key] for key in ("messages", "tools") if key in made}
    return _Made(first | made, changes, left_out)


def _line(made: _Made, file: str, number: int, begin: bytes, account: Account) -> str | Problem:
    """The line to write for a record, or why there is none; either is counted."""
    account.read += 1
    checked = check_record(made.record, file, number, begin)
    if isinstance(checked, Problem):
        # The same reason at another message is the same reason.
        account.refused.setdefault(re.sub(r"\[\d+\]", "[..]", checked.reason), Places()).add(file, number)
        return checked
    assert isinstance(made.record, dict)
    for change in made.changes:
        account.changed.setdefault(change, Places()).add(file, number)
    for key, why in made.left_out.items():
        account.left_out.setdefault(f"`{key}` ({why})", Places()).add(file, number)
    for key in made.record:
        if key not in ("messages", "tools"):
            account.kept.setdefault(key, Places()).add(file, number)
    account.written += 1
    return _json(made.record)


def _json(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    line.encode()  # halves of surrogate pairs cannot be written
    return line


def _is_json(value: Any) -> bool:
    try:
        _json(value)
    except (TypeError, ValueError):
        return False
    return True


# --- where records come from -----------------------------------------------------------------------------------------


def _blocks(source: str, output: Path, format: str, account: Account, hub: Hub) -> Iterator[tuple[str, Block, str]]:
    """Each block with the name and the format of its file. What cannot be read at all is refused first."""
    # A misspelled path is not looked for on the network, which takes half a minute where there is none.
    path = Path(source)
    if HUB_NAME.fullmatch(source) and not (path.exists() or path.parent.exists() or source.endswith(SUFFIXES)):
        named = [(source, _hub_blocks(source, hub))]
    else:
        files = conversation_files(source)
        if output.exists() and any(output.samefile(file) for file in files):
            raise UserError(f"{output}: is one of the files to read; write to another file")
        named = [(str(file), read_raw_blocks(file)) for file in files]
    return _with_format(named, format, account)


def _with_format(
    named: list[tuple[str, Iterator[Block]]], format: str, account: Account
) -> Iterator[tuple[str, Block, str]]:
    for name, blocks in named:
        found, empty = format, True
        for block in blocks:
            found, empty = found or _recognize(name, block), False
            yield name, block, found or "messages"
        if empty:
            yield name, Block([(1, b"", "the file holds no conversation")]), "messages"
        title = FORMATS[found].title if found in FORMATS else f"the columns {found}" if found else "not known"
        account.formats.setdefault(title, Places()).add(name)
        account.files += 1


def _recognize(name: str, block: Block) -> str:
    """The format of a block's records; "" if it holds none that can be read."""
    found = recognize_block(block)
    for number, record, _ in parse_block(block):
        if isinstance(record, dict) and found not in NAMES:
            if not found:
                keys = ", ".join(f"`{visible(key)}`" for key in record) or "none"
                raise UserError(
                    f"{name}:{number}: no format that megasft knows (keys: {keys}); for columns of text give "
                    "--format PROMPT/ANSWER, as --format question/answer"
                )
            raise UserError(f"{name}:{number}: {formats.to_messages(record, found)}")
    return found


def _hub_blocks(name: str, hub: Hub) -> Iterator[Block]:
    """The rows of a dataset of the Hub, from the network or the cache of `datasets`."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{name}: no such file or folder; to read a dataset of the Hub: {INSTALL_DATASETS}") from None
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, hub.subset, split=hub.split, revision=hub.revision)
    except Exception as error:  # datasets raises all kinds, of its own, the Hub's and the network's
        reason = visible(" ".join(str(error).split()), 300)
        raise UserError(f"{name}: no such file or folder, and no dataset that can be loaded ({reason})") from None
    return _row_blocks(table)


def _row_blocks(table: Any) -> Iterator[Block]:
    first = 1
    for rows in table.with_format("arrow").iter(batch_size=256):
        yield Block(rows=rows, first_row=first)
        first += len(rows)
