"""What is said of a run beside its curves: its state, its progress, its settings as text."""

import json
import math
from typing import Any

from megasft.board import plots
from megasft.board.run_folder import Run
from megasft.board.table import AXES

SHOWN = (
    "train.loss", "train.lr", "train.tokens_per_second", "train.mfu", "train.token_accuracy", "train.epoch",
    "train.seconds", "validation.loss", "validation.perplexity", "validation.token_accuracy",
)  # fmt: skip
LONGEST = 2000  # characters of a setting
MOST = 1000  # settings


def state_of(run: Run) -> dict[str, Any]:
    """The line of a run in the list; its lock is held."""
    content = run.content
    known = set(content.keys)
    return {
        "id": run.id,
        "name": run.name,
        "state": run.state(),
        "version": run.version,
        "read": round(run.share_read, 3),
        "step": content.step,
        "steps": total_steps(run),
        "started": content.started,
        "ended": content.ended,
        "tokens": content.tokens,
        "last": {name: float(f"{content.last[name]:.6g}") for name in SHOWN if name in content.last},
        "lowest": content.lowest,
        "noted": content.noted,
        "frames": len(content.frames),
        "answers": len(run.answers()),
        "extents": {axis: place[:2] for axis in AXES if (place := content.extent(axis))},
        "plots": [plot.id for plot in plots.PLOTS if plots.resolve(plot, known)],
    }


def total_steps(run: Run) -> int | None:
    """The steps a run will take; None where nothing says so."""
    planned = run.about().get("total_steps")
    if isinstance(planned, int) and 0 < planned < 2**53:
        return planned
    hyper = run.config().get("hyperparameters")
    hyper = hyper if isinstance(hyper, dict) else {}
    most, epochs, epoch = hyper.get("max_steps"), hyper.get("n_epochs", 1), run.content.last.get("train.epoch", 0.0)
    found = [float(most)] if isinstance(most, int) and most > 0 else []
    if epoch > 0 and isinstance(epochs, int):
        found.append(math.ceil(run.content.step / epoch * epochs - 1e-6))
    return int(min(found)) if found and min(found) < 2**53 else None


def flat_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """`section.key` and its value as text, in the order of the file."""
    found: list[tuple[str, str]] = []

    def add(value: Any, name: str) -> None:
        if len(found) >= MOST:
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(inner, f"{name}.{key}" if name else str(key))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            found.append((name[:200], text[:LONGEST]))

    if settings:
        add(settings, "")
    return found
