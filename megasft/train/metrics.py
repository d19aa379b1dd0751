"""What a run records: metrics.jsonl, its trackers and the terminal."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megasft.config.keys import redact
from megasft.messages import say
from megasft.train.display import open_display
from megasft.train.trackers import Background, Line


class Metrics:
    """Writes each record as one line of `metrics.jsonl` (flushed, so that a killed run keeps it), and to the trackers.

    A full disk does not end the run: lines that cannot be written are buffered and written later. A warning says so,
    and another when they are written.

    Args:
        step, length: of a resumed run: its step, and the bytes of `metrics.jsonl` when that step was saved. Of later
            lines only those of checkpoints up to `step` stay: they are written when a checkpoint is on disk.

    Attributes:
        checkpoints: the steps of the checkpoints among these lines.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        step: int = 0,
        length: int = 0,
        trackers: Callable[[], list[Background]] = list,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten: list[bytes] = []
        self._step = step  # of the last line
        self._length = min(length, self._file.tell())  # of complete lines
        kept = _checkpoint_lines(self._path, self._length, step) if length else []
        self._file.truncate(self._length)
        self.checkpoints = [number for number, _ in kept]
        for _, line in kept:
            self._write(line)
        self._trackers = trackers()
        self.display = open_display(total_steps, step)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """`write`, and a line on the terminal, except of what would fill it; both without the user's keys."""
        if kind == "event":
            values = {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}
        self.write(kind, step, **values)
        if kind not in ("experts", "norms", "devices"):
            self.display.show(kind, step, values)
        self._report_trackers(step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line `{"kind": kind, "step": step, "time": seconds since 1970, ...}`.

        Trackers get its numbers as kind/name (`flat`).
        """
        now = round(time.time(), 3)
        self._step = step
        self._write(json.dumps({"kind": kind, "step": step, "time": now, **values}, allow_nan=False) + "\n")
        if self._trackers:
            line = Line(kind, step, now, values, flat(kind, values))
            for tracker in self._trackers:
                tracker.log(line)

    def _report_trackers(self, step: int) -> None:
        """Record the trackers that have failed, and give them up."""
        failed = [tracker for tracker in self._trackers if tracker.failure]
        self._trackers = [tracker for tracker in self._trackers if tracker not in failed]
        for tracker in failed:
            reason = f"{tracker.name} gets no more numbers, training continues ({tracker.failure})"
            self.record("event", step, event="tracker failed", reason=reason)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines of `metrics.jsonl`."""
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError):
                    record = json.loads(line)
                    record["kind"]
                    yield record

    @property
    def length(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        return self._length

    def sync(self) -> None:
        """Flush what was written to the disk."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: another thread has just closed it
            os.fsync(self._file.fileno())

    def _write(self, line: str) -> None:
        self._unwritten.append(line.encode())
        data = b"".join(self._unwritten)
        try:
            if self._file.write(data) != len(data):
                self._file.truncate(self._length)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._length += len(data)
            if len(self._unwritten) > 1:
                say("metrics.jsonl: can be written again; the buffered lines are in it")
            self._unwritten.clear()
        except OSError as error:
            if len(self._unwritten) == 1:
                say(f"metrics.jsonl: cannot be written ({error.strerror}); its lines are buffered, training continues")

    def close(self) -> None:
        """Flush and close everything."""
        trackers = self._trackers
        for tracker in trackers:
            tracker.close()
        self._report_trackers(self._step)
        self.display.close()
        self.sync()
        self._file.close()


def flat(name: str, value: Any) -> dict[str, float]:
    """The numbers in a value, by names such as norms/updates/lora_A/q_proj and devices/power/0 (of rank 0); tables and
    text have none.
    """
    if isinstance(value, int | float):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    parts = [
        flat(f"{name}/{key}", one) for key, one in items if not (isinstance(value, list) and isinstance(one, list))
    ]
    return {key: number for part in parts for key, number in part.items()}


def _checkpoint_lines(path: Path, start: int, step: int) -> list[tuple[int, str]]:
    """(step, line) of the checkpoints up to `step`, from byte `start` on."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be cut off
                record = json.loads(line)
                if record["kind"] == "checkpoint" and record["step"] <= step and line.endswith("\n"):
                    found.append((record["step"], line))
    return found
