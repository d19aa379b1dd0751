"""The learning rate equals that of transformers' schedules with the same names."""

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
