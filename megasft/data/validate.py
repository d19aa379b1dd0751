"""What is in a dataset, what is wrong with it, and what a model would learn from it: `megasft validate`."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import batched, groupby, islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megasft.data.conversations import Conversation, Problem, Problems, read_conversations
from megasft.data.records import visible
from megasft.data.template import BATCH, DEFAULT_OVERLONG, Encoded, OverLong, TrainOn, encode_many, fit
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
        fitted: what a run with this `overlong` does with the conversations, as `template.fit` counts it.
    """

    path: str
    sequence_length: int
    conversations: int = 0
    turns: int = 0
    duplicates: int = 0
    lengths: array = field(default_factory=lambda: array("q"))
    supervised_tokens: int = 0
    over_length: int = 0
    overlong: OverLong = DEFAULT_OVERLONG
    fitted: Counter[str] = field(default_factory=Counter)
    problems: Problems = field(default_factory=Problems)

    @property
    def exit_code(self) -> int:
        """1 if there was any problem. Duplicates and over-length are none: a run knows what to do with them."""
        return int(self.problems.total > 0)


def validate_dataset(
    path: str | Path,
    tokenizer: ChatTokenizer | None,
    sequence_length: int,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
    overlong: OverLong = DEFAULT_OVERLONG,
) -> Report:
    """Read, check and (with a tokenizer) tokenize every conversation, in one pass and bounded memory.

    Raises:
        UserError: there is nothing at `path` to read.
    """
    report = Report(str(path), sequence_length, overlong=overlong)
    seen: set[int] = set()
    for conversation, result in _encoded(path, tokenizer, train_on, parse_special_in_text):
        if isinstance(result, Problem):
            report.problems.add(result)
            continue
        assert conversation is not None
        report.conversations += 1
        report.turns += len(conversation.messages)
        content = json.dumps([conversation.messages, conversation.tools], sort_keys=True).encode()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        report.duplicates += digest in seen
        seen.add(digest)
        if result is not None:
            report.lengths.append(len(result))
            report.supervised_tokens += int(result.mask.sum())
            report.over_length += len(result) > sequence_length
            fit(result, sequence_length, overlong, report.fitted)
    return report


def print_report(report: Report, console: Console | None = None) -> int:
    """Print the table and the first problems; return the exit code."""
    console = console or Console()
    table = Table(title=Text(visible(report.path, 200)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    for line in report.problems.lines():
        console.print(Text(visible(line, 500), style="red"), soft_wrap=True)
    return report.exit_code


def show(
    path: str | Path,
    tokenizer: ChatTokenizer,
    count: int,
    train_on: TrainOn = "all",
    parse_special_in_text: bool = False,
    console: Console | None = None,
) -> None:
    """Print the first `count` conversations as the model gets them, supervised tokens in colour.

    Where the console has no colours, between ⟦ and ⟧.
    """
    console = console or Console()
    colour = console.is_terminal and not console.no_color
    for conversation, result in islice(_encoded(path, tokenizer, train_on, parse_special_in_text), count):
        if not isinstance(result, Encoded):
            console.print(Text(visible(str(result), 500), style="red"), soft_wrap=True)
            continue
        assert conversation is not None
        title = f"{conversation.file}:{conversation.line} ({len(result)} tokens, {int(result.mask.sum())} supervised)"
        console.rule(Text(visible(title, 200)))
        shown = Text()
        for supervised, run in groupby(range(len(result)), key=result.mask.__getitem__):
            text = _harmless(tokenizer.decode(result.ids[list(run)]))
            if supervised:
                shown.append(text if colour else f"⟦{text}⟧", style="black on green")
            else:
                shown.append(text)
        console.print(shown, soft_wrap=True)


def _encoded(
    path: str | Path, tokenizer: ChatTokenizer | None, train_on: TrainOn, parse_special_in_text: bool
) -> Iterator[tuple[Conversation | None, Encoded | Problem | None]]:
    """Every record in order: with its tokens, or with its problem. Without a tokenizer the tokens are None."""
    for batch in batched(read_conversations(path), BATCH):
        good = [record for record in batch if isinstance(record, Conversation)]
        results: Iterator[Encoded | Problem | None] = iter([None] * len(good))
        if tokenizer is not None:
            results = iter(encode_many(good, tokenizer, train_on, parse_special_in_text))
        for record in batch:
            yield (None, record) if isinstance(record, Problem) else (record, next(results))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "conversations", f"{report.conversations:,}"
    yield "turns", f"{report.turns:,}"
    if report.lengths:
        lengths = np.frombuffer(report.lengths, dtype=np.int64)
        total = int(lengths.sum())
        yield "tokens", f"{total:,}"
        quantiles = np.percentile(lengths, [0, 50, 95, 100]).round().astype(int)
        yield "tokens: min, median, p95, max", ", ".join(f"{value:,}" for value in quantiles)
        yield "supervised", f"{report.supervised_tokens / total:.1%}"
        done = [f"{report.fitted[what]:,} {what}" for what in ("truncated", "split", "dropped") if report.fitted[what]]
        yield f"over-length (> {report.sequence_length:,})", f"{report.over_length:,}"
        if done:
            yield f"  {report.overlong}", ", ".join(done)
    yield "duplicates", f"{report.duplicates:,}"
    yield "problems", f"{report.problems.total:,}"


def _harmless(text: str) -> str:
    """`text` with its line breaks, and everything else that a terminal could obey written as an escape."""
    return "\n".join(visible(line, len(line)) for line in text.split("\n"))
