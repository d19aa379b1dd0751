"""What is said of a dataset's conversations: why one cannot be used, and what of it the model will not see."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from megasft.data.records import visible

OnError = Literal["stop", "skip"]
PLACES = 3  # of a note that are named
KINDS = 100  # of notes that are told apart


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one record cannot be used. `excerpt` is safe to print."""

    file: str
    line: int
    reason: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" + (f" | {self.excerpt}" if self.excerpt else "")


@dataclass
class Problems:
    """Counts every problem and keeps the first `limit` to show."""

    limit: int = 20
    total: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Count `problem`, and keep it if there is room."""
        self.total += 1
        if len(self.first) < self.limit:
            self.first.append(problem)

    def lines(self) -> list[str]:
        """The kept problems, one line each, and how many more there are."""
        more = self.total - len(self.first)
        return [*map(str, self.first), *([f"... and {more} more"] if more else [])]


class WrongError(Exception):
    """A record is refused: `reason`, and an excerpt of what is wrong that is safe to print."""

    def __init__(self, reason: str, culprit: Any = None):
        self.reason = reason
        self.excerpt = "" if culprit is None else visible(culprit if isinstance(culprit, str) else repr(culprit))


@dataclass
class Note:
    """Something that is left out of conversations: how often, of how many, and of which (file, line) first."""

    count: int = 0
    conversations: int = 0
    places: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ", ".join(str(line) for _, line in self.places)
        more = ", ..." if self.conversations > len(self.places) else ""
        plural = "s" if self.conversations > 1 else ""
        return f"{self.count:,} in {self.conversations:,} conversation{plural} (line {lines}{more})"


class Notes(dict[str, Note]):
    """The notes of many conversations, by what they say."""

    def add(self, counts: Counter[str], file: str, line: int) -> None:
        """Add those of one conversation."""
        for name, count in counts.items():
            self._add(name, Note(count, 1, [(file, line)]))

    def merge(self, others: "Notes") -> None:
        """Add those of later conversations."""
        for name, note in others.items():
            self._add(name, note)

    def _add(self, name: str, more: Note) -> None:
        if name not in self and len(self) >= KINDS:
            name = "other ignored keys"  # a dataset may name its keys at random
        note = self.setdefault(name, Note())
        note.count += more.count
        note.conversations += more.conversations
        note.places = [*note.places, *more.places][:PLACES]
