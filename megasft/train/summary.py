"""What a finished run reports."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megasft.config.schema import RunConfig
from megasft.train import trackers


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        steps: optimizer steps of the whole run.
        trained: of these, the steps that this launch took; 0 where the run was finished already.
        train_loss: mean over the last 10 steps of this launch; None if it took none.
        validation_loss: the last; None where not measured.
        best: the best value of `[training.validation] metric_for_best_model`; None where not measured.
        seconds: from the start of `fit` to its end.
        tokens: that this launch trained on.
        peak_memory_bytes: of rank 0.
    """

    steps: int
    trained: int
    train_loss: float | None
    validation_loss: float | None
    best: float | None
    seconds: float
    tokens: int
    peak_memory_bytes: int


def print_summary(summary: Summary, config: RunConfig) -> None:
    """Print how a run ended, where its results are and what to do with them."""
    folder = Path(config.job.output_dir)
    finished_before = summary.trained == 0
    table = Table(title="megasft: done", show_header=False, title_justify="left")
    rows = [
        ("steps", f"{summary.steps:,}" + (" (all of them in an earlier launch)" if finished_before else "")),
        ("training loss, mean of the last 10 steps", _loss(summary.train_loss)),
        ("validation loss", "not measured" if summary.validation_loss is None else _loss(summary.validation_loss)),
        (f"best validation {_metric(config)}", _loss(summary.best)),
        ("tokens", "" if finished_before else f"{summary.tokens:,} ({_rate(summary):,.0f} per second overall)"),
        ("time", "" if finished_before else f"{summary.seconds:,.1f} s"),
        ("peak memory of rank 0", f"{summary.peak_memory_bytes / 2**30:.2f} GiB"),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, value)
    console = Console()
    console.print(table)
    # Plain lines, which a narrow terminal wraps and never cuts: paths and commands are there to be copied.
    best, report = folder / "best", folder / "report.html"
    places = [
        ("adapter", folder / "adapter"),
        ("best adapter", best if best.is_dir() else None),
        ("metrics", folder / "metrics.jsonl"),
        ("report", report if report.is_file() else None),
        ("watch it", shlex.join(["megasft", "dashboard", str(folder)])),
        *trackers.places(config),
        ("try it", shlex.join(["megasft", "generate", str(folder)])),
        ("merge it", shlex.join(["megasft", "merge", str(folder / "adapter"), str(folder / "merged")])),
    ]
    for name, place in places:
        if place:
            console.print(f"{name + ':':<14}{place}", soft_wrap=True, highlight=False, markup=False)


def _metric(config: RunConfig) -> str:
    return config.training.validation.metric_for_best_model.removeprefix("val.").replace("_", " ")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _rate(summary: Summary) -> float:
    return summary.tokens / max(summary.seconds, 1e-9)
