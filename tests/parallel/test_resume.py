"""A run that is interrupted and goes on: bit for bit under the same topology, and as under any other under another."""

import pytest
import torch

from tests.parallel.invariance import Case
from tests.parallel.resume import CASES, EVERY, STEPS, Runs, difference, lines, tensors

LAST = f"step-{STEPS:06d}"


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"), ranks)


def assert_same_run(one, other):
    assert lines(one) == lines(other)
    wanted, got = tensors(one, LAST), tensors(other, LAST)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    written = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (one, other)]
    assert written[0] == written[1]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [Case(2, tensor=2, expert_tensor=2, batch=2), Case(4, tensor=2, expert=2)], ids=str)
def test_the_same_topology_goes_on_bit_for_bit(ranks, tmp_path, case, bf16):
    # With dropout: its masks are those that the run without a break drew.
    runs = Runs(tmp_path, ranks, dropout=0.3, bf16=bf16)
    whole = runs.run(case, "whole")
    assert_same_run(whole, runs.go_on(whole, EVERY, case, "from a scheduled one"))
    assert_same_run(whole, runs.go_on(whole, 5, case, "from an odd one")) if (
        whole / "checkpoints/step-000005"
    ).exists() else None


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda place: f"{CASES[place]} to the next")
def test_another_topology_goes_on_within_rounding(runs, place):
    before, after = CASES[place], CASES[(place + 1) % len(CASES)]
    whole = runs.run(before, f"whole {before}")
    other = runs.go_on(whole, EVERY, after, f"{before} to {after}")
    # The bound of the invariance suite, for the same reason.
    assert difference(whole, other) <= 1e-5
    assert [(line["kind"], line["step"]) for line in lines(whole)] == [
        (line["kind"], line["step"]) for line in lines(other)
    ]
