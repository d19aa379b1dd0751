"""A run on the terminal: a progress bar below the lines of its history, or plain lines for logs."""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0  # at least, from one training line to the next


class Display(Protocol):
    """Shows the records of a run as they come."""

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record."""

    def close(self) -> None:
        """Leave the terminal as it was found; a second call does nothing."""


def open_display(total_steps: int, step: int) -> Display:
    """The display that suits standard error, for a run that has taken `step` of `total_steps` steps."""
    return Bar(total_steps, step, Console(stderr=True)) if sys.stderr.isatty() else Lines(total_steps)


def describe(kind: str, values: dict[str, Any]) -> str:
    """A record in a few words."""
    if kind == "train" and values["loss"] is None:
        return "skipped: loss or gradient is not finite"
    if kind == "train":
        return (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
    if kind == "validation":
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        return f"validation loss {loss} over {values['tokens']:,} tokens"
    if kind == "checkpoint":
        return f"checkpoint written to {values['path']}"
    return f"{kind}: " + "  ".join(f"{name} {value}" for name, value in values.items())


class _History:
    """Which records get a line: every one, but of training steps one in LINE_SECONDS and the last."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._last = total_steps, 0.0

    def line(self, kind: str, step: int, values: dict[str, Any]) -> str | None:
        if kind == "train":
            now = time.monotonic()
            if now - self._last < LINE_SECONDS and step < self._total:
                return None
            self._last = now
        return f"step {step}/{self._total}: {describe(kind, values)}"


class Bar:
    """A progress bar; the history scrolls by above it."""

    def __init__(self, total_steps: int, step: int, console: Console) -> None:
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[said]}",
        )
        self._progress = Progress(
            *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console, transient=True
        )
        self._history = _History(total_steps)
        self._task = self._progress.add_task("training", total=total_steps, completed=step, said="")
        self._progress.start()

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Move the bar; print the line."""
        if kind == "train":
            self._progress.update(self._task, completed=step, said=describe(kind, values))
        if line := self._history.line(kind, step, values):
            self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away and show the cursor again."""
        self._progress.stop()


class Lines:
    """Plain lines, with the time left."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._started = total_steps, time.monotonic()
        self._first_step: int | None = None
        self._history = _History(total_steps)

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Print the line."""
        if self._first_step is None:
            self._first_step = step - 1
        line = self._history.line(kind, step, values)
        if line is None:
            return
        if kind == "train":
            done = max(1, step - self._first_step)
            line += f"  {(time.monotonic() - self._started) / done * (self._total - step):,.0f} s left"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to do."""
