"""What a run says: metrics.jsonl, TensorBoard, and a progress bar or plain lines on the terminal. Rank 0 only."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Metrics:
    """Writes each record as one line of `metrics.jsonl` (flushed, so that a killed run keeps it) and to TensorBoard."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._display = _Bar(total_steps) if sys.stderr.isatty() else _Lines(total_steps)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line `{"kind": kind, "step": step, ...}`; numbers go to TensorBoard as kind/name."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._display.show(kind, step, values)

    def close(self) -> None:
        """Flush and close everything."""
        self._display.close()
        self._board.close()
        self._file.close()


def describe(kind: str, values: dict[str, Any]) -> str:
    """A record in a few words, for the terminal."""
    if kind == "train":
        return (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
    if kind == "validation":
        return f"validation loss {values['loss']:.4f} over {values['tokens']:,} tokens"
    return f"{kind}: " + "  ".join(f"{name} {value}" for name, value in values.items())


class _Bar:
    def __init__(self, total_steps: int) -> None:
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[said]}",
        )
        self._progress = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns),
                                  console=Console(stderr=True))  # fmt: skip
        self._task = self._progress.add_task("training", total=total_steps, said="")
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
