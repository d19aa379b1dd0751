"""The learning rate equals that of transformers' schedules with the same names."""

import math

import pytest
import torch
from transformers import get_scheduler

from megasft.train.schedule import Schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (1, 0.5), (7, 0.03), (100, 0.03), (100, 0.0), (33, 1.0)])
def test_rates_equal_those_of_transformers(kind, total, ratio):
    schedule = Schedule(kind, 3e-4, total, ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, schedule.warmup_steps, total)
    for step in range(total):
        assert schedule.rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        theirs.step()


def test_warm_up_lasts_the_share_of_steps_rounded_up():
    assert Schedule("linear", 1.0, 101, 0.03).warmup_steps == 4


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 33])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_case_08_no_warm_up_keeps_a_run_from_its_peak(kind, total, ratio):
    """A run of one step with warm-up trained at learning rate 0 and wrote an adapter of zeros."""
    schedule = Schedule(kind, 1e-3, total, ratio)
    assert max(map(schedule.rate, range(total))) == 1e-3
    asked = math.ceil(total * ratio)
    assert bool(schedule.shortened) == (asked == total)
    if schedule.shortened:
        assert f"warmup_ratio = {ratio:g}" in schedule.shortened
        assert f"shortened to {total - 1}" in schedule.shortened
        assert "\n" not in schedule.shortened
    else:
        assert schedule.warmup_steps == asked
