"""What there is to say of conversation files that became samples: how many, what was cut, what could not be used."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megasft.data.problems import Note, Notes, OnError, Problem, Problems
from megasft.data.tokenize import Recipe, Tokens
from megasft.messages import UserError, say_once

_LINES = 2**40  # more than a file has


class Place(NamedTuple):
    """Where a conversation is: the number of its file and its line."""

    file: int
    line: int

    @classmethod
    def of(cls, number: int) -> "Place":
        """From the number that a column of places has."""
        return cls(*divmod(number, _LINES))


@dataclass(frozen=True)
class Account:
    """Of a dataset.

    Attributes:
        samples, tokens, supervised: what came out.
        counts: what `overlong.fit` did, by conversation.
        longest: tokens of the longest conversation.
        problems: how many conversations could not be used.
        first_problems: [number of the file, line, reason, excerpt] of the first of them.
        notes: [what is left out, how often, of how many conversations, [number of the file, line] of the first].
    """

    samples: int
    tokens: int
    supervised: int
    counts: dict[str, int]
    longest: int
    problems: int
    first_problems: list[tuple[int, int, str, str]]
    notes: list[tuple[str, int, int, list[tuple[int, int]]]]

    @property
    def conversations(self) -> int:
        """Those that could be used, dropped ones included."""
        return sum(self.counts.get(what, 0) for what in ("kept", "truncated", "split", "dropped"))

    def report(
        self, path: str | Path, files: Sequence[Path], recipe: Recipe, on_error: OnError, listed: str = ""
    ) -> None:
        """Say on standard error what was skipped and cut; `listed` says where all problems are.

        Raises UserError where a conversation cannot be used and `on_error` is "stop", or there is nothing at all.
        """
        first = [Problem(str(files[number]), line, *why) for number, line, *why in self.first_problems]
        total = self.problems
        if total and on_error == "stop":
            others = "1 more problem" if total == 2 else f"{total - 1} more problems"
            more = f" (and {others}; `megasft validate` lists them)" if total > 1 else ""
            raise UserError(f"{first[0]}{more}")
        if not self.samples:
            raise UserError(f"{path}: {recipe.nothing_left(self.counts.get('dropped', 0), self.longest)}")
        cut = [f"{self.counts[what]:,} {what}" for what in ("truncated", "split", "dropped") if self.counts.get(what)]
        lost = f", {self.counts['targets cut']:,} supervised tokens lost" if self.counts.get("targets cut") else ""
        long = f"; over-length: {', '.join(cut)} ({recipe.overlong}){lost}" if cut else ""
        say_once(
            f"{path}: {self.conversations:,} conversations, {self.samples:,} samples, {self.tokens:,} tokens, "
            f"{self.supervised / self.tokens:.1%} supervised{long}"
        )
        for name, count, of, places in self.notes:
            say_once(f"  {name}: {Note(count, of, [(str(files[number]), line) for number, line in places])}")
        if total:
            say_once(f"{path}: skipped {total:,}{f', {listed}' if listed else ''}")
            for problem in first:
                say_once(f"  {problem}")


class Tally:
    """Adds up the account of `files`, block by block."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._numbers = {str(file): number for number, file in enumerate(files)}
        self._problems, self._counts, self._notes, self._longest = Problems(), Counter[str](), Notes(), 0
        self.samples = self.tokens = self._supervised = 0

    def places(self, block: Tokens) -> np.ndarray:
        """The column of places of a block's samples, int64 [samples]."""
        return self._numbers[block.file] * _LINES + block.lines

    def add(self, block: Tokens) -> None:
        """Count a block."""
        self.samples, self.tokens = self.samples + len(block.lengths), self.tokens + len(block.ids)
        self._supervised += int(block.mask.sum())
        self._counts += block.counts
        self._notes.merge(block.notes)
        self._longest = max(self._longest, block.longest)
        for problem in block.problems:
            self._problems.add(problem)

    def account(self) -> Account:
        """Of all blocks so far."""
        first = [(self._numbers[one.file], one.line, one.reason, one.excerpt) for one in self._problems.first]
        notes = [
            (name, note.count, note.conversations, [(self._numbers[file], line) for file, line in note.places])
            for name, note in self._notes.items()
        ]
        return Account(
            self.samples,
            self.tokens,
            self._supervised,
            dict(self._counts),
            self._longest,
            self._problems.total,
            first,
            notes,
        )
