"""What is in a dataset, what is wrong with it, and what a model would learn from it: `megasft validate`."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import batched, groupby, islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megasft.data.conversations import Conversation, read_conversations
from megasft.data.overlong import Encoded, fit
from megasft.data.problems import Notes, Problem, Problems
from megasft.data.records import visible
from megasft.data.template import BATCH, encode_many
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer import ChatTokenizer


@dataclass
class Report:
    """Counts over a dataset. Token counts stay empty where there was no tokenizer.

    Attributes:
        conversations: records that can be trained on.
        turns: their messages.
        duplicates: conversations that said the same as one before.
        lengths: tokens of each conversation.
        supervised_tokens: targets among all tokens.
        over_length: conversations of more than `sequence_length` tokens.
        fitted: what a run does with the conversations, as `overlong.fit` counts it.
        notes: what the model will not see of them.
        positions: the longest sample that the model was made for, None where that is not known; `beyond` are longer.
        date: the day that the chat template writes; "" where it writes none.
    """

    path: str
    recipe: Recipe
    conversations: int = 0
    turns: int = 0
    duplicates: int = 0
    lengths: array = field(default_factory=lambda: array("q"))
    supervised_tokens: int = 0
    over_length: int = 0
    fitted: Counter[str] = field(default_factory=Counter)
    notes: Notes = field(default_factory=Notes)
    problems: Problems = field(default_factory=Problems)
    positions: int | None = None
    beyond: int = 0
    date: str = ""

    @property
    def exit_code(self) -> int:
        """1 if there was any problem, or if a run would have nothing to learn from.

        Duplicates, notes and over-length are none: a run knows what to do with them.
        """
        return int(self.problems.total > 0 or (bool(self.lengths) and not self.fitted["samples"]))


def validate_dataset(
    path: str | Path, tokenizer: ChatTokenizer | None, recipe: Recipe, positions: int | None = None
) -> Report:
    """Read, check and (with a tokenizer) tokenize every conversation, in one pass and bounded memory.

    Raises:
        UserError: there is nothing at `path` to read.
    """
    report = Report(str(path), recipe, positions=positions)
    if tokenizer and tokenizer.writes_date:
        report.date = f"today's, {tokenizer.template_date or date.today()} for a run that begins now"
    seen: set[int] = set()
    for conversation, result in _encoded(path, tokenizer, recipe):
        if isinstance(result, Problem):
            report.problems.add(result)
            continue
        assert conversation is not None
        report.conversations += 1
        report.turns += len(conversation.messages)
        notes = conversation.notes
        content = json.dumps([conversation.messages, conversation.tools], sort_keys=True).encode()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        report.duplicates += digest in seen
        seen.add(digest)
        if result is not None:
            notes = notes + result.notes
            report.lengths.append(len(result))
            report.supervised_tokens += int(result.mask.sum())
            report.over_length += len(result) > recipe.sequence_length
            pieces = fit(result, recipe.sequence_length, recipe.overlong, report.fitted)
            report.beyond += bool(positions) and any(len(piece) > (positions or 0) for piece in pieces)
        report.notes.add(notes, conversation.file, conversation.line)
    return report


def print_report(report: Report, console: Console | None = None) -> int:
    """Print the table and the first problems; return the exit code."""
    console = console or Console()
    console.print(Text(visible(report.path, 200)), soft_wrap=True)  # never cut: as a title it would be
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    for name, note in report.notes.items():
        console.print(Text(visible(f"{name}: {note}", 500)), soft_wrap=True)
    if report.lengths and not report.fitted["samples"]:
        line = report.recipe.nothing_left(report.fitted["dropped"], max(report.lengths))
        console.print(Text(line, style="red"), soft_wrap=True)
    for line in report.problems.lines():
        console.print(Text(visible(line, 500), style="red"), soft_wrap=True)
    return report.exit_code


def show(
    path: str | Path, tokenizer: ChatTokenizer, count: int, recipe: Recipe, console: Console | None = None
) -> None:
    """Print the samples of the first `count` conversations as the model gets them, supervised tokens in colour.

    Where the console has no colours, between ⟦ and ⟧.
    """
    console = console or Console()
    colour = console.is_terminal and not console.no_color
    for conversation, result in islice(_encoded(path, tokenizer, recipe), count):
        if not isinstance(result, Encoded):
            console.print(Text(visible(str(result), 500), style="red"), soft_wrap=True)
            continue
        assert conversation is not None
        pieces = fit(result, recipe.sequence_length, recipe.overlong)
        place = f"{conversation.file}:{conversation.line}"
        cut = f", cut from {len(result)} by {recipe.overlong}" if len(result) > recipe.sequence_length else ""
        if not pieces:
            left = f"{place}: {recipe.overlong} leaves nothing to learn from of its {len(result)} tokens"
            console.print(Text(visible(left, 500), style="red"), soft_wrap=True)
        for number, piece in enumerate(pieces, 1):
            part = f", sample {number} of {len(pieces)}" if len(pieces) > 1 else ""
            title = f"{place} ({len(piece)} tokens, {int(piece.mask.sum())} supervised{part}{cut})"
            console.rule(Text(visible(title, 200)))
            shown = Text()
            for supervised, run in groupby(range(len(piece)), key=piece.mask.__getitem__):
                text = _harmless(tokenizer.decode(piece.ids[list(run)]))
                if supervised:
                    shown.append(text if colour else f"⟦{text}⟧", style="black on green")
                else:
                    shown.append(text)
            console.print(shown, soft_wrap=True)


def _encoded(
    path: str | Path, tokenizer: ChatTokenizer | None, recipe: Recipe
) -> Iterator[tuple[Conversation | None, Encoded | Problem | None]]:
    """Every record in order: with its tokens, or with its problem. Without a tokenizer the tokens are None."""
    for batch in batched(read_conversations(path, recipe.ignore_keys), BATCH):
        good = [record for record in batch if isinstance(record, Conversation)]
        results: Iterator[Encoded | Problem | None] = iter([None] * len(good))
        if tokenizer is not None:
            results = iter(
                encode_many(good, tokenizer, recipe.train_on, recipe.parse_special_in_text, recipe.lost_reasoning)
            )
        for record in batch:
            yield (None, record) if isinstance(record, Problem) else (record, next(results))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "conversations", f"{report.conversations:,}"
    yield "turns", f"{report.turns:,}"
    if report.lengths:
        lengths, fitted, length = np.frombuffer(report.lengths, dtype=np.int64), report.fitted, report.recipe
        total = int(lengths.sum())
        yield "tokens", f"{total:,}"
        quantiles = np.percentile(lengths, [0, 50, 95, 100]).round().astype(int)
        yield "tokens: min, median, p95, max", ", ".join(f"{value:,}" for value in quantiles)
        yield "supervised", f"{report.supervised_tokens / total:.1%}"
        done = [f"{fitted[what]:,} {what}" for what in ("truncated", "split", "dropped") if fitted[what]]
        yield f"over-length (> {length.sequence_length:,})", f"{report.over_length:,}"
        if done:
            yield f"  {length.overlong}", ", ".join(done)
            yield "  tokens cut", f"{fitted['tokens cut']:,}"
            yield "  supervised tokens cut", f"{fitted['targets cut']:,} of {report.supervised_tokens:,}"
            yield "  with nothing left to learn from", f"{fitted['emptied']:,}"
        yield "samples", f"{fitted['samples']:,}"
        if report.positions and report.beyond:
            yield f"beyond the model's {report.positions:,} positions", f"{report.beyond:,}"
    if report.date:
        yield "date in the chat template", report.date
    yield "duplicates", f"{report.duplicates:,}"
    yield "problems", f"{report.problems.total:,}"


def _harmless(text: str) -> str:
    """`text` with its line breaks, and everything else that a terminal could obey written as an escape."""
    return "\n".join(visible(line, len(line)) for line in text.split("\n"))
