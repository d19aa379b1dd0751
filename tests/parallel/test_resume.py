"""An interrupted run resumes bitwise exactly with the same topology, and within rounding with another."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasft.train.checkpoint import run_lock
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parallel.resume import CASES, EVERY, STEPS, Runs, difference, lines, tensors
from tests.support import on_ranks

LAST = f"step-{STEPS:06d}"
# After one step all activations are saturated: the validation loss is bad and stays the same to the last bit, whatever
# the processor, so the first of several is the best.
FAR_TOO_FAST = {"learning_rate": 100.0, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"), ranks, dropout=0.1)


def assert_same_run(one, other):
    assert lines(one) == lines(other)
    wanted, got = tensors(one, LAST), tensors(other, LAST)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    written = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (one, other)]
    assert written[0] == written[1]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [Case(2, tensor=2, expert_tensor=2, batch=2), Case(4, tensor=2, expert=2)], ids=str)
def test_resuming_with_the_same_topology_is_bitwise_exact(ranks, tmp_path, case, bf16):
    runs = Runs(tmp_path, ranks, dropout=0.3, bf16=bf16)
    whole = runs.run(case, "whole")
    assert_same_run(whole, runs.resume_from(whole, EVERY, case, "from a scheduled one"))


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda place: f"{CASES[place]} to the next")
def test_resuming_with_another_topology_agrees_within_rounding(runs, place):
    before, after = CASES[place], CASES[(place + 1) % len(CASES)]
    whole = runs.run(before, f"whole {before}")
    other = runs.resume_from(whole, EVERY, after, f"{before} to {after}")
    # With dropout; the bound of the invariance suite, for the same reason.
    assert difference(whole, other) <= 1e-5
    assert [(line["kind"], line["step"]) for line in lines(whole)] == [
        (line["kind"], line["step"]) for line in lines(other)
    ]
    assert shown(other) == list(range(1, STEPS + 1))


def shown(run):
    """The steps of the loss curve in TensorBoard."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def saved(run):
    """The steps of the existing checkpoints, and those that metrics.jsonl lists."""
    there = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-000???"))
    return there, [line["step"] for line in lines(run) if line["kind"] == "checkpoint"]


def test_a_checkpoint_is_written_at_the_end_of_each_epoch_and_of_the_run(runs):
    assert saved(runs.run(CASES[0], "epochs", checkpoint={"every_steps": 100})) == ([3, 6, STEPS], [3, 6, STEPS])


def test_a_checkpoint_is_written_when_enough_time_has_passed(ranks, runs):
    run = runs.run(Case(2), "minutes", checkpoint={"every_steps": 100, "every_minutes": 1e-9})
    assert saved(run)[0] == list(range(1, STEPS + 1))


def test_the_newest_checkpoints_and_the_best_one_are_kept(runs):
    others = [runs.folder / "keep" / "checkpoints" / name for name in ("step-000002.keep", "step-mine", "latest")]
    for folder in others:  # the user's own; a link that became a folder when it was copied
        folder.mkdir(parents=True)
    run = runs.run(CASES[0], "keep", checkpoint={"every_steps": 1, "keep": 2}, hyperparameters=FAR_TOO_FAST)
    assert all(folder.is_dir() for folder in others)
    best = min((line for line in lines(run) if line["kind"] == "validation"), key=lambda line: line["loss"])["step"]
    assert best == 2
    assert saved(run) == ([best, STEPS - 1, STEPS], list(range(1, STEPS + 1)))


def test_checkpoints_may_be_a_link_to_another_disk(runs):
    whole = runs.run(CASES[0], "whole")
    (runs.folder / "big").mkdir()
    (runs.folder / "linked").mkdir()
    (runs.folder / "linked" / "checkpoints").symlink_to("../big")
    assert_same_run(whole, runs.resume_from(whole, EVERY, CASES[0], "linked"))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["back", "elsewhere"])
def test_the_best_adapter_comes_from_this_run(runs, elsewhere):
    before = runs.run(CASES[0], f"best {elsewhere}")
    given_up = (before / "best" / "adapter_model.safetensors").read_bytes()
    # Every validation from here on is worse than that at 2, of which nothing is left.
    again = runs.run(
        CASES[0],
        "best elsewhere" if elsewhere else before.name,
        checkpoint={"resume": str(before / "checkpoints" / f"step-{EVERY:06d}")},
        hyperparameters=FAR_TOO_FAST,
    )
    best = min(
        (line for line in lines(again) if line["kind"] == "validation" and line["step"] > EVERY),
        key=lambda line: line["loss"],
    )
    assert json.loads((again / "best" / "validation.json").read_text())["step"] == best["step"]
    assert (again / "best" / "adapter_model.safetensors").read_bytes() != given_up
    if not elsewhere:
        assert (again / "earlier-1" / "best" / "adapter_model.safetensors").read_bytes() == given_up


def test_a_best_loss_on_other_validation_data_does_not_count(runs):
    more = {"hyperparameters": {"learning_rate": 10.0, "lr_schedule": "constant", "max_steps": STEPS + 2}}
    before = runs.run(CASES[0], "judged anew")
    held_out, runs.held_out = runs.held_out, runs.samples
    try:
        again = runs.run(CASES[0], before.name, **more)
    finally:
        runs.held_out = held_out
    losses = {line["step"]: line["loss"] for line in lines(again) if line["kind"] == "validation"}
    assert losses[STEPS + 2] > losses[STEPS]
    assert json.loads((again / "best" / "validation.json").read_text())["step"] == STEPS + 2


def test_a_finished_run_without_checkpoints_is_moved_aside(runs):
    before = runs.run(CASES[0], "bare")
    kept = lines(before)
    shutil.rmtree(before / "checkpoints")
    again = runs.run(CASES[0], "bare", job={"seed": 3})
    assert lines(again / "earlier-1") == kept
    assert (again / "earlier-1" / "adapter").exists()
    assert [line["step"] for line in lines(again) if line["kind"] == "train"] == list(range(1, STEPS + 1))


def test_a_resumed_run_trains_on_changed_data_for_the_remaining_epochs(runs):
    epochs = {"hyperparameters": {"max_steps": None, "n_epochs": 3}}
    whole = runs.run(CASES[0], "three epochs", **epochs)
    assert saved(whole)[0] == [3, 6, 9]
    fewer, runs.samples = runs.samples, on_ranks.random_samples(runs.config.vocab_size, [7] * 22)
    try:  # six steps an epoch in place of three
        other = runs.resume_from(
            whole, 6, CASES[0], "longer epochs", checkpoint={"allow_changed": ["data"], "every_steps": 4}, **epochs
        )
        assert saved(other)[0] == [6, 8, 12]
    finally:
        runs.samples = fewer


def failing_to_save(settings, samples):
    """The results of the first and of the second wait for a failed save."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.output_dir.mkdir()
    (trainer.output_dir / "checkpoints").touch()
    trainer.checkpoint()
    first = trainer.writer.wait()
    trainer._report_saves()
    return first, trainer.writer.wait(), trainer.writer.take_outcome()


def test_a_failed_save_is_reported_again_when_the_run_is_stopped(ranks, runs, tmp_path):
    settings = runs.settings(CASES[0], "unused", job={"output_dir": str(tmp_path / "run")})
    for first, second, left in ranks(1, failing_to_save, settings, runs.samples):
        assert first == second
        assert "Not a directory" in first or "File exists" in first
        assert left is None


def locked_elsewhere(settings, samples):
    """Whether the folder is locked for another process: before the run, while it trains, afterwards."""
    config, topology, model = on_ranks.start(settings)
    file = Path(settings["job"]["output_dir"]) / run_lock.NAME
    # Not in this process, to which its own locks are none, and which would give them back on closing the file.
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    look = lambda: file.exists() and subprocess.run([sys.executable, "-c", code, file], capture_output=True).returncode  # noqa: E731
    seen = [look()]
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.fit(lambda: seen.append(look()))
    return [*seen, look()]


def test_a_run_locks_its_folder_while_it_trains(ranks, runs, tmp_path):
    settings = {
        "job": {"model": str(runs.folder / "base"), "output_dir": str(tmp_path / "run")},
        "lora": {"r": 4},
        "hyperparameters": {"max_steps": 1, "parallelism": {"bf16": False}},
    }
    assert ranks(1, locked_elsewhere, settings, runs.samples) == [[False, 1, 0]]


def test_a_checkpoint_whose_line_was_not_written_any_more_gets_it_when_the_run_resumes(runs):
    whole, again = runs.run(CASES[0], "whole"), runs.folder / "line lost"
    kept = again / "checkpoints" / f"step-{EVERY:06d}"
    shutil.copytree(whole / "checkpoints" / kept.name, kept)
    text = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    others = [line for line in text if (json.loads(line)["kind"], json.loads(line)["step"]) != ("checkpoint", EVERY)]
    assert len(others) == len(text) - 1
    (again / "metrics.jsonl").write_text("".join(others))
    assert saved(runs.run(CASES[0], again.name)) == saved(whole) == ([3, 6, STEPS], [3, 6, STEPS])
