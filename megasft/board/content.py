"""What the lines of a metrics.jsonl say, gathered as they come."""

import json
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megasft.board.table import AXES, Axis, Row, Series, Table

EVENTS = 1000  # the newest so many are kept, and as many checkpoints
FRAMES = 96  # of the experts' load
TEXT = 4000  # characters of a text
LAYERS, EXPERTS = 256, 512  # the most of a frame
PARTS = ("data_wait", "compute_seconds", "reduce_seconds", "optimizer_seconds")  # of a step's `seconds`


class Content:
    """The tables and events of one run.

    Attributes:
        last: the newest number of each column, by its name `kind.key`.
        lowest: the lowest validation loss and its step.
        events, checkpoints: newest last: step, time (s since 1970), event, reason.
        noted: events and checkpoints so far.
        frames: (step, tokens [layer, expert]) over the run, evenly thinned out.
        step, tokens: of the last `train` line; tokens since the start.
        started, ended: time of the first and the last line, s since 1970; 0 before the first.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.last: dict[str, float] = {}
        self.lowest: tuple[float, int] | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self.checkpoints: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self.frames: list[tuple[int, NDArray[np.float32]]] = []
        self.noted = self.step = 0
        self.tokens = self.started = self.ended = 0.0
        self._every, self._seen = 1, 0

    def add(self, lines: list[bytes]) -> None:
        """Take in lines; one that is no record is left out."""
        rows: dict[str, list[Row]] = {}
        for line in lines:
            try:
                record = json.loads(line)
                kind, step, time = record.pop("kind"), record.pop("step"), record.pop("time")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if not (isinstance(kind, str) and _number(step) and _number(time) and abs(step) < 2**53):
                continue
            self._take(rows, kind, int(step), float(time), record)
        for kind, of_kind in rows.items():
            self.tables.setdefault(kind, Table()).append(of_kind)

    def series(self, key: str, axis: Axis) -> Series | None:
        """The column `kind.name`."""
        kind, _, name = key.partition(".")
        table = self.tables.get(kind)
        return table.series(name, axis) if table else None

    def extent(self, axis: Axis) -> tuple[float, float, int] | None:
        """The lowest and highest place of any row, and the most rows of a table; None where there is none."""
        places = [table.extent(AXES.index(axis)) for table in self.tables.values() if table.rows]
        if not places:
            return None
        return min(low for low, _ in places), max(high for _, high in places), max(t.rows for t in self.tables.values())

    @property
    def keys(self) -> list[str]:
        """All columns, as `kind.name`."""
        return [f"{kind}.{name}" for kind, table in self.tables.items() for name in table.names]

    def _take(self, rows: dict[str, list[Row]], kind: str, step: int, time: float, record: dict[str, Any]) -> None:
        self.started = self.started or time
        self.ended = max(self.ended, time)
        if kind in ("train", "validation", "norms", "devices"):
            values = _flat(record)
            if kind == "train":
                # Lines without the sum: the steps between two of them had about as many tokens.
                between = values.get("tokens", 0.0) * max(0, step - self.step)
                self.tokens = values.get("trained_tokens", self.tokens + between)
                self.step = max(step, self.step)
                _split(values)
            loss = values.get("loss")
            if kind == "validation" and loss is not None and (self.lowest is None or loss < self.lowest[0]):
                self.lowest = loss, step
            self.last |= {f"{kind}.{name}": value for name, value in values.items()}
            rows.setdefault(kind, []).append(Row(step, self.tokens, time - self.started, values))
        elif kind == "experts":
            self._add_frame(step, record.get("tokens"))
        elif kind == "checkpoint":
            self.checkpoints.append({**_event(step, time, record), "event": "checkpoint"})
            self.noted += 1
        elif kind == "event":
            self.events.append(_event(step, time, record))
            self.noted += 1

    def _add_frame(self, step: int, tokens: Any) -> None:
        """Keep every n-th; when there are FRAMES, leave out each second and double n."""
        try:
            table = np.array([layer[:EXPERTS] for layer in tokens[:LAYERS]], np.float32)
        except (TypeError, ValueError, OverflowError):
            return
        if table.ndim != 2 or not table.size or not np.isfinite(table).all():
            return
        if self._seen % self._every == 0:
            self.frames.append((step, table))
        self._seen += 1
        if len(self.frames) >= FRAMES:
            self.frames, self._every = self.frames[::2], 2 * self._every


def _flat(record: dict[str, Any], prefix: str = "", depth: int = 3) -> dict[str, float]:
    """The finite numbers of a record: nested ones as a.b, of a list (an item a rank) the mean."""
    values: dict[str, float] = {}
    for name, value in record.items():
        if _number(value):
            values[f"{prefix}{name}"] = float(value)
        elif isinstance(value, dict) and depth:
            values |= _flat(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, list) and (known := [item for item in value if _number(item)]):
            values[f"{prefix}{name}"] = sum(known) / len(known)
    return values


def _split(values: dict[str, float]) -> None:
    """Add what is left of a step's time when its parts are taken away."""
    if "seconds" in values:
        values["other_seconds"] = max(0.0, values["seconds"] - sum(values.get(part, 0.0) for part in PARTS))


def _number(value: Any) -> bool:
    """Whether a value from JSON is a finite number that is no bool; asked dozens of times a line."""
    return (type(value) is float or type(value) is int) and -1e300 < value < 1e300


def _event(step: int, time: float, record: dict[str, Any]) -> dict[str, Any]:
    reason = record.get("reason", record.get("path", ""))
    return {"step": step, "time": time, "event": str(record.get("event", ""))[:80], "reason": str(reason)[:TEXT]}
