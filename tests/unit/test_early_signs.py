"""Each early sign is found where it is there, said once, and not found where it is not."""

import json
import random

import numpy as np
import pytest
import torch

from megasft.train.early_signs import ENOUGH, RISES, SLOW_LINES, EarlySigns, add_seen, idle_experts

ONE = {"loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 1000.0}


def noisy(lines: int, seed: int = 0) -> list[dict]:
    """Lines of a healthy run: a loss that falls with noise of 5%, gradient norms within a factor of 3, 10% in speed."""
    chance = random.Random(seed)
    return [
        {
            "loss": (1 + 2 * 0.99**i) * chance.gauss(1, 0.05),
            "grad_norm": chance.uniform(0.5, 1.5),
            "tokens_per_second": 1000 * chance.uniform(0.9, 1.1),
        }
        for i in range(lines)
    ]


def events(lines: list[dict], signs: EarlySigns | None = None, kind: str = "train") -> list[tuple[int, str]]:
    """(number of the line, event) of all that is found."""
    signs = signs or EarlySigns()
    return [(i, event["event"]) for i, line in enumerate(lines) for event in signs.see(kind, line)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_none(seed):
    assert events(noisy(600, seed)) == []


@pytest.mark.parametrize(("key", "event", "high"), [("loss", "loss_spike", 3.5), ("grad_norm", "grad_norm_spike", 8.0)])
def test_a_spike_is_found_once_until_it_is_over(key, event, high):
    lines = noisy(200)
    for i in (120, 121, 122):
        lines[i][key] = high
    assert events(lines) == [(120, event)]
    lines[180][key] = high
    assert events(lines) == [(120, event), (180, event)]
    reason = next(found["reason"] for signs in [EarlySigns()] for line in lines for found in signs.see("train", line))
    assert f"{high:.4f}" in reason


def test_a_spike_needs_lines_to_stand_out_from():
    lines = [dict(ONE) for _ in range(ENOUGH)]
    lines[ENOUGH - 1]["loss"] = 50.0
    assert events(lines) == []
    lines.append(ONE | {"loss": 50.0})
    assert events(lines) == [(ENOUGH, "loss_spike")]


def test_skipped_steps_are_no_spikes_and_hide_none():
    lines = [dict(ONE) for _ in range(60)]
    for i in range(30, 40):
        lines[i] |= {"loss": None, "grad_norm": None}
    lines[45]["loss"] = 9.0
    assert events(lines) == [(45, "loss_spike")]


def test_throughput_below_70_percent_of_the_median_is_found_where_it_stays():
    lines = noisy(100)
    lines[50]["tokens_per_second"] = 500.0  # a checkpoint, say
    assert events(lines) == []
    for line in lines[60:80]:
        line["tokens_per_second"] = 600.0
    assert events(lines) == [(60 + SLOW_LINES - 1, "slow_throughput")]
    for line in lines[90:]:
        line["tokens_per_second"] = 600.0
    assert [event for _, event in events(lines)] == ["slow_throughput"] * 2


def test_a_validation_loss_that_rises_again_and_again_is_found():
    losses = [3.0, 2.0, 2.1, 2.2, 2.1, 2.2, 2.3]  # two rises, a fall, two rises
    assert events([{"loss": loss} for loss in losses], kind="validation") == []
    found = events([{"loss": loss} for loss in [*losses, 2.4, 2.5, None, 2.6, 2.7]], kind="validation")
    assert found == [(len(losses), "validation_rising"), (len(losses) + 4, "validation_rising")]
    assert RISES == 3


def seen_by(ranks: list[list[float]]) -> list[dict]:
    signs = EarlySigns()
    return [event for busy in ranks for event in signs.compare_ranks(np.array(busy))]


def test_a_slow_rank_is_named():
    chance = random.Random(0)
    even = [[chance.uniform(0.9, 1.1) for _ in range(4)] for _ in range(200)]
    assert seen_by(even) == []
    slow = [[*busy[:2], 1.5 * busy[2], busy[3]] for busy in even]
    (event,) = seen_by(slow)
    assert (event["event"], event["ranks"]) == ("slow_rank", [2])
    assert event["reason"].startswith("rank 2 was busy 1.")
    assert [event["ranks"] for event in seen_by([*even, *slow, *even, *slow])] == [[2], [2]]
    both = [[busy[0], 2 * busy[1], 1.5 * busy[2], busy[3], busy[0]] for busy in even]
    assert seen_by(both)[0]["reason"].startswith("rank 1 (and ranks 2) was busy")


def test_a_rank_that_was_slow_once_or_alone_is_not():
    once = [[1.0, 30.0 if i == 5 else 1.0] for i in range(100)]
    assert seen_by(once) == []
    assert seen_by([[1.0]] * 100) == []
    assert [event["ranks"] for event in seen_by([[1.0, 1.5]] * 100)] == [[1]]


def test_an_expert_without_a_token_in_an_epoch_is_found():
    layers, experts = [1, 3], 5
    tokens = torch.ones(2, experts, dtype=torch.int64)
    tokens[1, 4] = tokens[0, 2] = 0
    seen = add_seen("", tokens)
    (event,) = idle_experts(seen, layers, experts)
    assert (event["event"], event["experts"]) == ("idle_expert", [[1, 2], [3, 4]])
    assert "2 of 10 experts" in event["reason"]
    assert "expert 2 of layer 1, expert 4 of layer 3" in event["reason"]
    later = torch.zeros(2, experts, dtype=torch.int64)
    later[1, 4] = 7
    assert idle_experts(add_seen(seen, later), layers, experts)[0]["experts"] == [[1, 2]]
    later[0, 2] = 1
    assert idle_experts(add_seen(seen, later), layers, experts) == []
    assert idle_experts(add_seen("", torch.zeros(0, experts, dtype=torch.int64)), [], experts) == []


def test_a_resumed_run_that_reads_its_lines_finds_what_the_run_would_have_found():
    lines = noisy(200)
    lines[110]["loss"] = lines[150]["loss"] = 9.0
    whole = EarlySigns()
    expected = events(lines, whole)
    first, second = EarlySigns(), EarlySigns()
    found = events(lines[:115], first)
    for line in lines[:115]:
        second.see("train", json.loads(json.dumps(line)))
    found += [(115 + i, event) for i, event in events(lines[115:], second)]
    assert found == expected == [(110, "loss_spike"), (150, "loss_spike")]
