"""The run file as written: TOML text, overrides, the line of every key, and error messages that point to it.

`megasft.config.schema` defines the keys and their meaning; this module knows none of them.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from megasft.messages import UserError

Key = tuple[str, ...]  # ("data", "topology", "tensor_parallel")

LARGEST_FILE = 1 << 20  # bytes: a run file has some thousands; a data set passed by mistake has millions
CLOSE = (
    0.8  # difflib ratio above which a name counts as misspelled: alhpa and alpha have 0.8, num_proc and n_epochs 0.6
)


class Section(BaseModel):
    """A table of the run file. It refuses unknown keys, strings for numbers and infinities, and is immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass
class RunFile:
    """Settings before validation, with the place where each of them was written."""

    settings: dict[str, Any]
    name: str = ""  # the path as the user gave it; empty for settings that do not come from a file
    text: str = ""
    arguments: dict[Key, str] = field(default_factory=dict)  # key -> the command-line argument that set it

    @classmethod
    def read(cls, path: str | Path) -> "RunFile":
        """Read TOML from `path`. Raises UserError if it is missing, not a file, too large or not TOML."""
        path = Path(path)
        try:
            if not path.is_file():
                kind = "is not a file" if path.exists() else "no such file"
                raise UserError(f"{path}: {kind}; a run file is TOML, configs/ has some to copy")
            if (size := path.stat().st_size) > LARGEST_FILE:
                raise UserError(f"{path}: {size} bytes is no run file; the data set goes to --dataset or [job] data")
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
            return cls(tomllib.loads(text), str(path), text)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            found = re.search(r" \(at line (\d+), column \d+\)$", str(error))
            place, reason = (f"{path}:{found[1]}", str(error)[: found.start()]) if found else (str(path), str(error))
            raise UserError(f"{place}: not valid TOML: {reason}") from None

    def override(self, key: Key, value: Any, argument: str) -> None:
        """Set `key`, replacing the file's value. `argument` is the command-line argument that sets it."""
        table = self.settings
        for name in key[:-1]:
            if not isinstance(table.get(name), dict):
                table[name] = {}
            table = table[name]
        table[key[-1]] = value
        self.arguments.pop(key, None)  # the latest goes last
        self.arguments[key] = " ".join(argument.split())  # a message is one line

    def drop(self, key: Key) -> None:
        """Remove `key` if it is set."""
        table = self.find(key[:-1])
        if isinstance(table, dict):
            table.pop(key[-1], None)

    def find(self, key: Key) -> Any:
        """The value of `key`, or None if it is not set."""
        value: Any = self.settings
        for name in key:
            if isinstance(value, list) and name.isdigit():
                value = value[int(name)] if int(name) < len(value) else None
            else:
                value = value.get(name) if isinstance(value, dict) else None
        return value

    def at(self, key: Key) -> str:
        """Point at `key`: `run.toml:12: [lora] r = 0`, or `--set lora.r=0` if that is where it comes from."""
        written = spell(key, self.find(key))
        for made, argument in reversed(self.arguments.items()):
            if made[: len(key)] == key[: len(made)]:  # the argument set the key, a table around it, or something in it
                return argument if made == key else f"{argument}: {written}"
        lines = key_lines(self.text)
        line = next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)
        place = f"{self.name}:{line}: " if line else f"{self.name}: " if self.name else ""
        return place + written


def parse_override(argument: str) -> tuple[Key, Any]:
    """Split `section.key=value`. The value is TOML (`5e-6`, `true`, `["q_proj"]`); any other text is a string."""
    name, equals, text = argument.partition("=")
    key, text = tuple(part.strip() for part in name.split(".")), text.strip()
    shown = " ".join(argument.split())
    if not equals or not all(key):
        raise UserError(f"--set {shown}: must be section.key=value, as in lora.r=8")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        if text.startswith(("[", "{", '"', "'")):
            raise UserError(f"--set {shown}: the value is not valid TOML: {error}") from None
        return key, text
    # If the value contains a line break, it may parse as several keys; then it is a string.
    return key, parsed["value"] if len(parsed) == 1 else text


def paths(value: Any, key: Key = ()) -> Iterator[Key]:
    """The keys of nested tables, each table before its contents."""
    if key:
        yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths(inner, (*key, name))


def key_lines(text: str) -> dict[Key, int]:
    """The line, from 1, on which each key of a valid TOML text starts.

    tomllib reports no positions. But each TOML statement, a header or an assignment, is valid TOML by itself, and no
    incomplete statement is. So the shortest sequence of lines that parses is one statement.
    """
    lines: dict[Key, int] = {}
    table: Key = ()
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            first = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except ValueError:
            continue
        keys = list(paths(parsed))
        if statement.lstrip().startswith("[["):
            count = sum(key[:-1] == keys[-1] and key[-1].isdigit() for key in lines)
            table = (*keys[-1], str(count))
            keys.append(table)
        elif statement.lstrip().startswith("["):
            table = keys[-1]
        else:
            keys = [table + key for key in keys]
        for key in keys:
            lines.setdefault(key, first)
        statement = ""
    return lines


def spell(key: Key, value: Any = None) -> str:
    """`[lora] r = 8` for a setting, `[lora] r` without its value, `[data.topology]` for a table."""
    if not key:
        return "the settings"
    names = [name if re.fullmatch(r"[\w-]+", name) else json.dumps(name) for name in key]
    if isinstance(value, dict):
        return f"[{'.'.join(names)}]"
    section = f"[{'.'.join(names[:-1])}] " if names[:-1] else ""
    shown = "" if value is None else f" = {json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)}"
    return section + names[-1] + (shown if len(shown) <= 80 else shown[:80] + "...")


def explain(
    error: ValidationError, file: RunFile, model: type[BaseModel], aliases: Mapping[str, Key], absent: Mapping[str, str]
) -> str:
    """One line for pydantic's errors: the first one with its place and remedy, and the keys of the others.

    Args:
        aliases: keys by the names that other trainers give them.
        absent: settings of other trainers that megasft does not have, with what it does instead.
    """
    details = error.errors(include_url=False)
    keys = [tuple(str(part) for part in detail["loc"]) for detail in details]
    others = f" (and {len(keys) - 1} more: {', '.join('.'.join(key) for key in keys[1:])})" if keys[1:] else ""
    first, key = details[0], keys[0]
    match first["type"]:
        case "extra_forbidden":
            reason = _unknown(key, list(_known_keys(model)), aliases, absent)
        case "model_type" | "dict_type":
            reason = "must be a table"
        case "bool_type":
            reason = "must be true or false"
        case "literal_error" if " or " not in first["ctx"]["expected"]:
            reason = f"is not supported; set it to {first['ctx']['expected']}"
        case "value_error":
            reason = str(first["ctx"]["error"])
        case _:
            reason = re.sub("^(Input|String) should", "must", first["msg"])
    return f"{file.at(key)}: {reason}{others}"


def _unknown(key: Key, known: list[Key], aliases: Mapping[str, Key], absent: Mapping[str, str]) -> str:
    *section, name = (part for part in key if not part.isdigit())  # a number is an entry of an array of tables
    if instead := absent.get(name.lower()):
        return f"megasft has no such setting; {instead}"
    here = {other[-1]: other for other in known if other[:-1] == tuple(section)}
    anywhere = {other[-1]: other for other in reversed(known)}  # the first of equal names wins
    candidates = [aliases.get(name.lower()), anywhere.get(name.lower())]
    for names in (here, anywhere, aliases):
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=CLOSE)
        candidates += [names[one] for one in close]
    meant = next((candidate for candidate in candidates if candidate), None)
    if meant is None:
        return f"unknown key; known here: {', '.join(here)}"
    return f"unknown key; did you mean {meant[-1] if meant in here.values() else spell(meant)}?"


def _known_keys(model: type[BaseModel], section: Key = ()) -> Iterator[Key]:
    for name, info in model.model_fields.items():
        yield (*section, name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _known_keys(info.annotation, (*section, name))
        for entry in get_args(info.annotation):  # an array of tables
            if isinstance(entry, type) and issubclass(entry, BaseModel):
                yield from _known_keys(entry, (*section, name))
