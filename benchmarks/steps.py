"""Figures from timed steps, and a check that two sides trained the same model."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of losses at any step


@dataclass(frozen=True)
class Step:
    """Measurements of one optimizer step."""

    loss: float
    grad_norm: float
    seconds: float  # wall time
    optimizer_seconds: float  # wall time of clipping and AdamW, part of `seconds`
    cpu_seconds: float  # of all threads; other processes disturb it less than the wall time


def side_figures(
    steps: Sequence[Step], warmup: int, tokens: int, flops: float, limit: float, cpu_limit: float
) -> dict[str, Any]:
    """Figures of the steps after `warmup`. A step has `tokens` tokens and `flops` FLOPs, and takes at least `limit`
    seconds, `cpu_limit` of all cores.
    """
    timed = steps[warmup:]
    median = statistics.median(step.seconds for step in timed)
    cpu = statistics.median(step.cpu_seconds for step in timed)
    return {
        "tokens_per_second": tokens / median,
        "step_seconds": spread([step.seconds for step in timed]),
        "forward_backward_seconds": statistics.median(step.seconds - step.optimizer_seconds for step in timed),
        "optimizer_seconds": statistics.median(step.optimizer_seconds for step in timed),
        "cpu_seconds": cpu,
        "flops_per_second": flops / median,
        "share_of_limit": limit / median,
        "cpu_share_of_limit": cpu_limit / cpu,
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "seconds": [step.seconds for step in steps],
    }


def compare(ours: Sequence[Step], theirs: Sequence[Step], warmup: int, dtype: str) -> dict[str, Any]:
    """Speed ratios of paired steps, and the largest differences of loss and gradient norm, warm-up included."""
    pairs = list(zip(ours, theirs, strict=True))
    timed = pairs[warmup:]
    loss_differences = [abs(a.loss / b.loss - 1) for a, b in pairs]
    return {
        "speed_ratio": spread([b.seconds / a.seconds for a, b in timed]),
        "cpu_ratio": spread([b.cpu_seconds / a.cpu_seconds for a, b in timed]),
        "loss_difference": max(loss_differences),
        "grad_norm_difference": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs),
        # check each one, because max() may ignore a NaN
        "losses_agree": all(difference <= TOLERANCE[dtype] for difference in loss_differences),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and maximum."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "min": min(values), "max": max(values)}
