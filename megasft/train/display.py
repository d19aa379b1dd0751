"""A run on the terminal: a live view below the lines of its history, or plain lines for logs."""

import sys
import time
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from megasft.messages import size

LINE_SECONDS = 5.0  # at least, from one training line to the next
SPARKS, LEVELS = 32, "▁▂▃▄▅▆▇█"  # losses in the sparkline, each a mean over an equal share of the last LOSSES
LOSSES, EVENTS = 1024, 2
SHOWN_SCORES = ("exact_match", "call_match")  # of answers


class Display(Protocol):
    """Shows the records of a run as they come."""

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record."""

    def close(self) -> None:
        """Leave the terminal as it was found; a second call does nothing."""


def open_display(total_steps: int, step: int) -> Display:
    """The display that suits standard error, for a run that has taken `step` of `total_steps` steps."""
    return Live(total_steps, step, Console(stderr=True)) if sys.stderr.isatty() else Lines(total_steps)


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
        accuracy = f", {values['token_accuracy']:.1%} predicted right" if "token_accuracy" in values else ""
        scores = [f", {name.replace('_', ' ')} {values[name]:.1%}" for name in SHOWN_SCORES if name in values]
        return f"validation loss {loss} over {values['tokens']:,} tokens{accuracy}{''.join(scores)}"
    if kind == "checkpoint":
        return f"checkpoint written to {values['path']}"
    if kind == "event":
        return f"{values['event'].replace('_', ' ')}: {values['reason']}"
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


class Live:
    """A view of the run as it stands; the history scrolls by above it."""

    def __init__(self, total_steps: int, step: int, console: Console) -> None:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._view = View()
        self._progress = _Progress(
            *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console, transient=True
        )
        self._progress.view = self._view
        self._history = _History(total_steps)
        self._task = self._progress.add_task("training", total=total_steps, completed=step)
        self._progress.start()

    def show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Change the view; print the line."""
        self._view.see(kind, step, values)
        if kind == "train":
            self._progress.update(self._task, completed=step)
        if line := self._history.line(kind, step, values):
            self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Take the view away and show the cursor again."""
        self._progress.stop()


class _Progress(Progress):
    """A progress bar with the view's lines below it."""

    view: "View | None" = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.view:
            yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in self.view.lines())


class View:
    """What the lines below the progress bar say."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._train: dict[str, Any] = {}
        self._validation = ""
        self._events: deque[str] = deque(maxlen=EVENTS)

    def see(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record."""
        if kind == "train":
            self._train = values
            if values["loss"] is not None:
                self._losses.append(values["loss"])
        elif kind == "validation":
            loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
            self._validation = f"  validation {loss} (step {step})"
        elif kind == "event":
            self._events.append(f"step {step}: {describe(kind, values)}")

    def lines(self) -> list[str]:
        """Loss, speed, and the last events."""
        train = self._train
        if not train:
            return list(self._events)
        loss = "skipped" if train["loss"] is None else f"loss {train['loss']:.4f}"
        speed = [f"{train['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in train:
            speed.append(f"MFU {train['mfu']:.1%}")
        memory = train.get("memory_allocated", train.get("rss"))
        if memory is not None:
            speed.append(f"memory {size(memory)}, at most {size(train['memory_peak'])}")
        if train.get("data_wait", 0.0) > 0.05 * train.get("seconds", 0.0) > 0:
            speed.append(f"waits {train['data_wait'] / train['seconds']:.0%} for data")
        described = describe("train", train).partition("lr ")[2].rpartition("  ")[0]
        rate = f"  lr {described}" if described else ""
        return [f"{loss} {sparkline(list(self._losses))}{self._validation}{rate}", "  ".join(speed), *self._events]


def sparkline(values: list[float]) -> str:
    """Bars of the values, from the lowest of them to the highest, each the mean of an equal share."""
    if len(values) < 2:
        return ""
    parts = min(SPARKS, len(values))
    cuts = [i * len(values) // parts for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    return "".join(LEVELS[round((mean - low) / span * (len(LEVELS) - 1)) if span else 0] for mean in means)


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
