"""Validations answer conversations too, and any of their scores decides which adapter is best and when a run ends."""

import json
from pathlib import Path

import pytest

from megasft.config.measures import SCORES
from tests.faults.test_generate import without_weights
from tests.parity.test_evaluate import TEMPLATE, conversation
from tests.support import on_ranks
from tests.support.world import make_world

EACH_STEP = [
    "training.validation.eval_steps=1",
    "training.validation.generate=2",
    "training.validation.max_new_tokens=8",
]


@pytest.fixture
def world(tmp_path) -> Path:
    make_world(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE.read_text())
    lines = [json.dumps(conversation(number)) for number in range(1, 7)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def train(ranks, world: Path, *overrides: str, scripted: list[float] | None = None) -> dict:
    return ranks(1, on_ranks.train_with_answers, world / "job.toml", [*EACH_STEP, *overrides], scripted)[0]


def of(run: dict, kind: str) -> list[dict]:
    return [line for line in run["lines"] if line["kind"] == kind]


def test_a_validation_has_the_scores_that_an_evaluation_has(ranks, world):
    run = train(ranks, world, "hyperparameters.max_steps=2")
    validations = of(run, "validation")
    assert len(validations) == 2
    assert set(SCORES) <= validations[0].keys()
    for name in (*SCORES, "loss", "token_accuracy"):
        assert validations[-1][name] == pytest.approx(run["evaluated"][name], rel=1e-6), name


def test_conversations_that_are_held_out_by_share_are_answered(ranks, world):
    # validation_path comes from the run file; an empty validation share would be refused
    text = (world / "job.toml").read_text()
    (world / "job.toml").write_text(
        text.replace(f'validation_path = "{world}/validation.jsonl"', "validation_fraction = 0.4")
    )
    run = train(ranks, world, "hyperparameters.max_steps=1", "training.validation.generate=9")
    assert len(run["held_out"]) == 2
    conversations = {question.conversation for question in run["questions"]}
    assert len(conversations) == 2
    for question in run["questions"]:
        if question.turn == 0:
            assert any(ids[: len(question.prompt)] == question.prompt for ids in run["held_out"])
    assert 0 <= of(run, "validation")[0]["exact_match"] <= 1


@pytest.mark.parametrize(
    ("greater", "best", "value", "steps"), [(None, 2, 0.5, 4), ("true", 2, 0.5, 4), ("false", 1, 0.25, 3)]
)
def test_the_best_adapter_is_that_of_the_best_score(ranks, world, greater, best, value, steps):
    metric = [
        'training.validation.metric_for_best_model="val.exact_match"',
        "training.validation.early_stopping_patience=2",
    ]
    metric += [f"training.validation.greater_is_better={greater}"] if greater else []
    run = train(
        ranks, world, "hyperparameters.max_steps=4", "checkpoint.keep=9", *metric, scripted=[0.25, 0.5, 0.5, 0.25]
    )
    assert (run["state"].best_step, run["state"].best, run["state"].step) == (best, value, steps)
    assert run["summary"].best == value
    (event,) = [line for line in of(run, "event") if line["event"] == "early_stop"]
    word = "below" if greater == "false" else "above"
    assert event["reason"] == f"no validation exact match of the last 2 was {word} {value:.4f} of step {best}"
    assert json.loads((world / "run" / "best" / "validation.json").read_text())["step"] == best


def test_a_resumed_run_compares_with_the_best_of_the_same_measure_only(ranks, world):
    metric = 'training.validation.metric_for_best_model="val.exact_match"'
    train(ranks, world, "hyperparameters.max_steps=2", metric, scripted=[0.25, 0.75])
    again = train(ranks, world, "hyperparameters.max_steps=4", metric, scripted=[0.5, 0.25])
    assert (again["state"].best_step, again["state"].best) == (2, 0.75)
    other = train(
        ranks, world, "hyperparameters.max_steps=6", metric, "training.validation.generate=3", scripted=[0.5, 0.25]
    )
    assert (other["state"].best_step, other["state"].best) == (5, 0.5)


def test_a_score_that_no_answer_has_is_refused_before_weights_are_read(ranks, world):
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (world / "validation.jsonl").write_text(json.dumps(plain) + "\n")
    without_weights(world)
    with pytest.raises(AssertionError, match=r"val\.call_name: a share of reference calls, of which .* they give val\.exact_match, "):  # fmt: skip
        train(ranks, world, 'training.validation.metric_for_best_model="val.call_name"')
