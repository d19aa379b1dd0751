"""What a run says: metrics.jsonl, TensorBoard, and a progress bar or plain lines on the terminal. Rank 0 only."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megasft.messages import say


class Metrics:
    """Writes each record as one line of `metrics.jsonl` (flushed, so that a killed run keeps it) and to TensorBoard.

    A disk that takes no more lines does not end the run: they are kept for when it does. Both are said once.

    Args:
        step, length: of a run that goes on: what `metrics.jsonl` holds beyond `length` bytes came after `step`.
    """

    def __init__(self, folder: Path, total_steps: int, step: int = 0, length: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = open(folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._unwritten: list[bytes] = []
        self._length = min(length, self._file.tell())  # of whole lines
        self._file.truncate(self._length)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._display = _Bar(total_steps, step) if sys.stderr.isatty() else _Lines(total_steps)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line `{"kind": kind, "step": step, ...}`.

        Numbers go to TensorBoard as kind/name and to the terminal; a table of numbers to TensorBoard as a histogram.
        """
        self._write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
        with contextlib.suppress(OSError):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
                elif isinstance(value, list):
                    self._board.add_histogram(f"{kind}/{name}", np.array(value), step)
        if kind != "experts":
            self._display.show(kind, step, values)

    @property
    def length(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        return self._length

    def sync(self) -> None:
        """Have what was written reach the disk."""
        with contextlib.suppress(OSError):
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
                say("metrics.jsonl: written again, with the lines that were kept meanwhile")
            self._unwritten.clear()
        except OSError as error:
            if len(self._unwritten) == 1:
                say(f"metrics.jsonl: cannot be written ({error.strerror}); its lines are kept, and training goes on")

    def close(self) -> None:
        """Flush and close everything."""
        self._display.close()
        with contextlib.suppress(OSError):
            self._board.close()
        self._file.close()


def describe(kind: str, values: dict[str, Any]) -> str:
    """A record in a few words, for the terminal."""
    if kind == "train" and values["loss"] is None:
        return "skipped: the loss or the gradient is not finite"
    if kind == "train":
        return (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
    if kind == "validation":
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        return f"validation loss {loss} over {values['tokens']:,} tokens"
    return f"{kind}: " + "  ".join(f"{name} {value}" for name, value in values.items())


class _Bar:
    def __init__(self, total_steps: int, step: int) -> None:
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[said]}",
        )
        self._progress = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns),
                                  console=Console(stderr=True))  # fmt: skip
        self._task = self._progress.add_task("training", total=total_steps, completed=step, said="")
        self._progress.start()

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "train":
            self._progress.update(self._task, completed=step, said=describe(kind, values))
        else:
            self._progress.console.print(f"step {step}: {describe(kind, values)}", markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """For logs: a training line at most every five seconds, everything else at once."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._last, self._started = total_steps, 0.0, time.monotonic()
        self._first_step: int | None = None

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = step - 1
        if kind == "train" and now - self._last < 5 and step < self._total:
            return
        left = ""
        if kind == "train":
            self._last = now
            done = max(1, step - self._first_step)
            left = f"  {(now - self._started) / done * (self._total - step):,.0f} s left"
        print(f"step {step}/{self._total}: {describe(kind, values)}{left}", file=sys.stderr, flush=True)

    def close(self) -> None: ...
