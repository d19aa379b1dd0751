"""A run that stops early, and the experts that got no token in an epoch, are the same when the run was resumed between."""

import shutil
from itertools import zip_longest

import pytest

from tests.parallel.invariance import Case
from tests.parallel.resume import STEPS, Runs, lines, tensors

PATIENCE = 2
WORSE = {"learning_rate": 0.3, "warmup_ratio": 0.0, "lr_schedule": "constant", "max_grad_norm": 0.0}  # after some steps


def settings(patience):
    return {
        "training": {"validation": {"enabled": True, "eval_steps": 1, "early_stopping_patience": patience}},
        "hyperparameters": WORSE,
        "logging": {"experts_every_steps": 1},
        "checkpoint": {"every_steps": 1, "keep": 99},
    }


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    return Runs(
        tmp_path_factory.mktemp("runs"),
        ranks,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        num_experts=64,
        num_experts_per_tok=1,
        norm_topk_prob=False,
    )


@pytest.fixture(scope="module")
def stopped(runs):
    return runs.run(Case(2, expert=2), "stopped", **settings(PATIENCE))


def resumed(runs, run, step, case, name, **settings):
    shutil.copytree(run / "best", runs.folder / name / "best")
    return runs.resume_from(run, step, case, name, **settings)


def of(run, kind):
    return [record for record in lines(run) if record["kind"] == kind]


def events(run, name):
    return [record for record in of(run, "event") if record["event"] == name]


def test_it_stops_when_so_many_validations_found_no_lower_loss(stopped):
    losses = [record["loss"] for record in of(stopped, "validation")]
    lowest = [min(losses[: i + 1]) for i in range(len(losses))]
    stale = [i - losses.index(low) for i, low in enumerate(lowest)]
    assert stale[-1] == PATIENCE
    assert max(stale[:-1]) < PATIENCE
    assert len(losses) == of(stopped, "train")[-1]["step"] < STEPS
    (event,) = events(stopped, "early_stop")
    assert event["step"] == len(losses)
    assert f"{lowest[-1]:.4f} of step {losses.index(lowest[-1]) + 1}" in event["reason"]
    assert (stopped / "adapter" / "adapter_model.safetensors").is_file()
    assert (stopped / "checkpoints" / f"step-{len(losses):06d}" / "manifest.json").is_file()


def test_resumed_from_any_step_it_stops_at_the_same_one(runs, stopped):
    last = of(stopped, "train")[-1]["step"]
    for step in (last - 1, last - 2):
        again = resumed(runs, stopped, step, Case(2, expert=2), f"again-{step}", **settings(PATIENCE))
        different = [(a, b) for a, b in zip_longest(lines(again), lines(stopped)) if a != b]
        assert not different, different[0]
        found = tensors(again, f"step-{last:06d}")
        assert all(value.equal(found[name]) for name, value in tensors(stopped, f"step-{last:06d}").items())


def test_started_again_it_trains_nothing_and_with_more_patience_it_trains_on(runs, stopped):
    last = of(stopped, "train")[-1]["step"]
    again = resumed(runs, stopped, last, Case(2, expert=2), "once-more", **settings(PATIENCE))
    assert of(again, "train")[-1]["step"] == last
    assert '"resumed"' not in (again / "metrics.jsonl").read_text()
    more = resumed(runs, stopped, last, Case(2, expert=2), "more", **settings(99))
    assert of(more, "train")[-1]["step"] == STEPS


def test_experts_without_a_token_in_an_epoch_are_those_of_its_steps(stopped):
    tokens = [record["tokens"] for record in of(stopped, "experts")]
    epochs = len(tokens) // 3  # of three steps
    idle = [
        [
            [layer + 1, expert]  # the first layer is dense
            for layer in range(2)
            for expert in range(64)
            if not any(step[layer][expert] for step in tokens[3 * epoch : 3 * epoch + 3])
        ]
        for epoch in range(epochs)
    ]
    assert epochs
    assert all(idle)
    found = events(stopped, "idle_expert")
    assert [(event["step"], event["experts"]) for event in found] == [(3 * i + 3, idle[i]) for i in range(epochs)]
