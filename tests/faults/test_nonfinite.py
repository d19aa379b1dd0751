"""If the loss or a gradient is not finite, all ranks skip the step; too many skipped steps in a row end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megasft.messages import UserError
from megasft.train import forward_backward
from megasft.train.optimizer import owned
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parallel.resume import BATCH, STEPS, Runs, lines
from tests.support import on_ranks

CASES = [
    Case(2, tensor=2, expert_tensor=2, batch=2),
    Case(2, batch=2),
    Case(2, tensor=2, expert=2),
    Case(2, pipeline=2),
]
SPOILT = (3, 4)  # steps


def spoil(trainer: Trainer, where: str, value: float, rank: int) -> None:
    """In the steps SPOILT, put `value` into the loss, or into one gradient, of one rank."""
    if trainer.topology.rank != rank:
        return
    if where == "loss":
        loss_of = forward_backward._loss

        def loss(batch: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple:
            loss_sum, correct = output
            return loss_of(batch, (loss_sum * value if trainer.step in SPOILT else loss_sum, correct))

        forward_backward._loss = loss
    else:
        finalize = trainer.model.config.finalize_model_grads_func

        def finalized(*args: Any, **kwargs: Any) -> None:
            if trainer.step in SPOILT:  # before it is added up over ranks
                buffers = trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers
                buffers[-1].buckets[0].grad_data[0] = value
            finalize(*args, **kwargs)

        trainer.model.config.finalize_model_grads_func = finalized


def states(trainer: Trainer) -> dict[str, Any]:
    """Copies of what a step may change: weights, master weights, moments, Adam's counts."""
    found: dict[str, Any] = {name: part for name, (_, part) in on_ranks.adapter_parts(trainer.model).items()}
    for i, part in enumerate(owned(trainer.optimizer)):
        found |= {f"{i}/{name}": state.clone() for name, state in part.states.items()}
    for chained in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for i, state in enumerate(chained.optimizer.state.values()):
            found[f"step/{id(chained)}/{i}"] = torch.as_tensor(state["step"]).clone()
    return found


def spoilt(settings: dict[str, Any], samples: list, where: str, value: float, rank: int) -> list[dict[str, Any]]:
    """The records of seven steps; asserts that the spoiled steps change nothing and the others do."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    spoil(trainer, where, value, rank)
    records = []
    for step in range(7):
        before = states(trainer)
        records.append(trainer.train_step())
        after = states(trainer)
        same = before.keys() == after.keys() and all(value.equal(after[name]) for name, value in before.items())
        assert same == (step in SPOILT), step
    assert (trainer.state.step, trainer.state.updates, trainer.state.skipped) == (7, 5, 0)
    return records


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("nonfinite"), ranks)


@pytest.mark.parametrize(
    ("case", "where", "value", "rank"),
    [(CASES[0], "loss", torch.nan, 0), (CASES[1], "loss", torch.inf, 1), (CASES[1], "gradient", torch.nan, 0),
     (CASES[2], "gradient", torch.inf, 1), (CASES[3], "gradient", -torch.inf, 0)],
    ids=str,
)  # fmt: skip
def test_a_nonfinite_value_on_one_rank_skips_the_step_on_all(runs, case, where, value, rank):
    answers = runs.pool(case.ranks, spoilt, runs.settings(case, "unused"), runs.samples, where, value, rank)
    for records in answers:
        assert [i for i, record in enumerate(records) if record["loss"] is None] == list(SPOILT)


def fit(settings: dict[str, Any], samples: list, held_out: list, broken: bool) -> str:
    """Train to the end: "" or the error that stops the run."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples), on_ranks.as_samples(held_out))
    if broken:
        spoil(trainer, "gradient", torch.nan, 1)
    try:
        trainer.fit()
        return ""
    except UserError as error:
        return str(error)


def blind(settings: dict[str, Any], samples: list, held_out: list) -> None:
    """Train to the end with a NaN loss in every validation."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples), on_ranks.as_samples(held_out))
    loss_of = forward_backward._loss

    def loss(batch: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        return loss_of(batch, output if model.training else (output[0] * torch.nan, output[1]))

    forward_backward._loss = loss
    trainer.fit()


def test_a_nonfinite_validation_is_reported_and_the_run_continues(runs):
    settings = runs.settings(CASES[1], "blind")
    runs.pool(2, blind, settings, runs.samples, runs.held_out)
    found = [(line["step"], line["loss"]) for line in lines(runs.folder / "blind") if line["kind"] == "validation"]
    assert found == [(step, None) for step in (2, 4, 6, STEPS)]


def run(runs: Runs, name: str, broken: bool, most: int) -> tuple[Path, str]:
    settings = runs.settings(CASES[1], name, training={"max_nonfinite_steps": most, "validation": {"enabled": False}})
    said = runs.pool(2, fit, settings, runs.samples, runs.held_out, broken)
    assert said[0] == said[1]
    return runs.folder / name, said[0]


def test_skipped_steps_are_counted_and_their_samples_logged(runs):
    folder, said = run(runs, "skipping", broken=True, most=3)
    assert said == ""
    events = [line for line in lines(folder) if line["kind"] == "event"]
    assert [(event["event"], event["step"]) for event in events] == [("skipped", step + 1) for step in SPOILT]
    for event in events:
        assert len(event["samples"]) == len(set(event["samples"])) == BATCH
        assert set(event["samples"]) <= set(range(len(runs.samples)))
    state = json.loads((folder / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text())
    assert (state["step"], state["updates"], state["skipped"]) == (STEPS, STEPS - len(SPOILT), 0)


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_it_resumes_there(runs):
    folder, said = run(runs, "stopping", broken=True, most=2)
    assert "not finite in 2 steps in a row, the last of them step 5" in said
    assert "metrics.jsonl" in said
    assert "\n" not in said
    assert [line["step"] for line in lines(folder) if line["kind"] == "event"] == [4, 5]
    # From step 3, now that nothing is broken: as if nothing had been.
    whole, said = run(runs, "well", broken=False, most=2)
    assert said == ""
    assert run(runs, "stopping", broken=False, most=2)[1] == ""
    assert lines(folder) == lines(whole)
    adapters = [(one / "adapter" / "adapter_model.safetensors").read_bytes() for one in (folder, whole)]
    assert adapters[0] == adapters[1]


def test_skipped_steps_in_a_row_are_counted_across_a_resume(runs):
    # `spoil` breaks the steps 3 and 4; a checkpoint after the first of them has skipped = 1.
    settings = {
        "training": {"max_nonfinite_steps": 2, "validation": {"enabled": False}},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    name = "in between"
    said = runs.pool(2, fit, runs.settings(CASES[1], name, **settings), runs.samples, runs.held_out, True)
    assert "step 5" in said[0]
    newest = max((runs.folder / name / "checkpoints").glob("step-*"))
    assert (newest.name, json.loads((newest / "state.json").read_text())["skipped"]) == ("step-000004", 1)
    again = runs.pool(2, fit, runs.settings(CASES[1], name, **settings), runs.samples, runs.held_out, True)
    assert "2 steps in a row, the last of them step 5" in again[0]
