"""What a command does with an earlier run: resume it, move it aside or refuse."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from megasft import job
from megasft.data import token_cache
from megasft.train.checkpoint.folder import damage, read_state
from megasft.train.trainer import Trainer
from tests.parallel.resume import lines
from tests.support.forked import Command
from tests.support.speech import spoken
from tests.support.world import make_world


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A job with a finished run of four steps and checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("done")
    make_world(folder, tensor=2)
    assert start(folder).wait() == 0
    return folder


@pytest.fixture
def world(done, tmp_path) -> Path:
    """A copy of the finished job for a test to change."""
    folder = shutil.copytree(done, tmp_path / "world", symlinks=True)
    run_file = folder / "job.toml"
    run_file.write_text(run_file.read_text().replace(str(done), str(folder)))
    return folder


def launched(path: str) -> None:
    Path(path).touch()


def killed_once_in_data_preparation(path: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        token_cache._make = die  # type: ignore[assignment]


def killed_once_in_step_four(path: str) -> None:
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> dict:
        if trainer.step == 3:
            trainer.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(trainer)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Trainer.train_step = step  # type: ignore[method-assign]


def dying_before_weights_are_read(path: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    job.build_model = die  # type: ignore[assignment]


def told_to_stop_in_validation(path: str) -> None:
    evaluate = Trainer.evaluate

    def stopping(trainer: Trainer, samples: object) -> tuple[float, int]:
        if trainer.step == 2 and trainer.topology.is_first and not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return evaluate(trainer, samples)

    Trainer.evaluate = stopping  # type: ignore[method-assign]


def start(world: Path, *settings: str, options=(), in_rank=launched) -> Command:
    own = [f"data.cache_dir='{world}/cache'", "checkpoint.keep=9", *settings]
    overrides = [argument for setting in own for argument in ("--set", setting)]
    arguments = ["train", "--config", str(world / "job.toml"), *overrides, *options]
    return Command(arguments, world / "err", in_rank, (str(world / "launched"),))


def change_weights(world: Path) -> None:
    path = world / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100:] = bytes(100)
    path.write_bytes(content)


def change_model_config(world: Path) -> None:
    path = world / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


def change_data(world: Path) -> None:
    path = world / "train.jsonl"
    path.write_text(path.read_text().replace("what comes", "What comes"))


MORE = "hyperparameters.max_steps=6"
REFUSED = {
    "seed": ("job.seed=7", "[job] seed = 7:", "was trained with 42"),
    "r": ("lora.r=8", "[lora] r = 8:", "was trained with 4"),
    "alpha": ("lora.alpha=16", "[lora] alpha = 16.0:", "was trained with 8.0"),
    "targets": (
        "lora.target_modules=['q_proj']",
        "[lora] target_modules = q_proj:",
        "was trained with all-linear",
    ),
    "global batch": (
        "hyperparameters.per_device_batch=4",
        "a global batch of 2, and this run has 4",
        "per_device_batch",
    ),
    "accumulation": (
        "hyperparameters.gradient_accumulation_steps=2",
        "a global batch of 2",
        "gradient_accumulation_steps = 1",
    ),
    "no such checkpoint": ("checkpoint.resume='nowhere'", "[checkpoint] resume = 'nowhere': no such folder", ""),
}


@pytest.mark.parametrize(("setting", "what", "remedy"), REFUSED.values(), ids=REFUSED)
def test_a_changed_setting_that_forbids_resuming_is_refused_before_the_launch(world, setting, what, remedy):
    (world / "launched").unlink()
    command = start(world, MORE, setting)
    assert command.wait() == 2
    assert len(command.said().splitlines()) == 1
    assert what in command.said()
    assert remedy in command.said()
    assert not (world / "launched").exists()


@pytest.mark.parametrize("change", [change_weights, change_model_config])
def test_another_base_is_refused_before_the_launch_unless_allowed(world, change):
    (world / "launched").unlink()
    change(world)
    command = start(world, MORE)
    assert command.wait() == 2
    assert len(command.said().splitlines()) == 1
    assert "[job] model = " in command.said()
    assert "is not the base model" in command.said()
    assert not (world / "launched").exists()
    if change is change_weights:
        assert start(world, MORE, "checkpoint.allow_changed=['base']").wait() == 0
        assert [line["step"] for line in lines(world / "run") if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
        then, now = (read_state(world / "run/checkpoints" / name).identity for name in ("step-000004", "step-000006"))
        assert {name for name in now if now[name] != then[name]} == {"base model"}  # from here on it is this one


def test_other_data_are_refused_before_the_launch_unless_allowed(world):
    (world / "launched").unlink()
    change_data(world)
    command = start(world, MORE)
    assert command.wait() == 2
    assert len(command.said().splitlines()) == 1
    assert f"not those of the checkpoint: {world}/train.jsonl has other content; " in command.said()
    assert "--resume never" in command.said()
    assert not (world / "launched").exists()
    command = start(world, MORE, "checkpoint.allow_changed=['data']")
    assert command.wait() == 0, command.said()
    then, now = (read_state(world / "run/checkpoints" / name).loader for name in ("step-000004", "step-000006"))
    assert now["data"] != then["data"]


def test_a_setting_that_changes_the_samples_is_refused_before_weights_are_read(world):
    command = start(world, MORE, "hyperparameters.sequence_length=57", in_rank=dying_before_weights_are_read)
    assert command.wait() == 2
    (said,) = spoken(command.said())
    assert "not those of the checkpoint: [hyperparameters] sequence_length = 57 (was 256); " in said


def test_a_run_resumes_with_another_topology(world):
    topology = (
        "data.topology.tensor_parallel=1",
        "data.topology.data_parallel=2",
        "hyperparameters.per_device_batch=1",
    )
    command = start(world, MORE, *topology)
    assert command.wait() == 0, command.said()
    assert [line["step"] for line in lines(world / "run") if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert f"megasft: resuming from {world}/run/checkpoints/step-000004: 4 of 6 steps are done" in command.said()
    assert "resuming with another hyperparameters.max_steps 6 (was 4)" in command.said()


def test_a_finished_run_has_nothing_left_to_train(world):
    before = (world / "run" / "metrics.jsonl").read_bytes()
    command = start(world)
    assert command.wait() == 0
    assert (
        "megasft: nothing is left to train; to train more raise [hyperparameters] n_epochs or max_steps; for a new run name "
        "another [job] output_dir, or pass --resume never" in command.said()
    )
    assert (world / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_never_starts_from_scratch_and_moves_old_files_aside(world):
    before = lines(world / "run")
    for number in (1, 2):
        command = start(world, options=("--resume", "never"))
        assert command.wait() == 0
        earlier = world / "run" / f"earlier-{number}"
        assert f"moved checkpoints, metrics.jsonl, tensorboard, best, adapter to earlier-{number}" in command.said()
        assert lines(earlier) == lines(world / "run") == before
        assert damage(earlier / "checkpoints" / "step-000004") is None


def test_resume_never_holds_if_the_first_attempt_is_killed_before_it_starts(world):
    fresh = f"data.cache_dir='{world}/fresh'"
    options = ("--resume", "never", "--max-restarts", "1")
    command = start(world, fresh, options=options, in_rank=killed_once_in_data_preparation)
    assert command.wait() == 0, command.said()
    assert "megasft: restart 1 of 1, from the last checkpoint" in command.said()
    assert "nothing is left to train" not in command.said()
    assert (world / "run" / "earlier-1" / "adapter").is_dir()


def test_resume_never_applies_to_the_first_attempt_and_restarts_use_its_checkpoints(world):
    options = ("--resume", "never", "--max-restarts", "1")
    command = start(world, options=options, in_rank=killed_once_in_step_four)
    assert command.wait() == 0, command.said()
    assert "step-000002: 2 of 4 steps are done" in command.said()
    assert not (world / "run" / "earlier-2").exists()


def test_a_run_stopped_before_a_checkpoint_was_due_saves_one_and_says_how_to_resume(world):
    whole = lines(world / "run")
    (world / "launched").unlink()
    own = f"job.output_dir='{world}/other'"
    command = start(world, own, options=("--resume", "never"), in_rank=told_to_stop_in_validation)
    assert command.wait() == 130, command.said()
    holder = f"{world}/other/checkpoints/step-000002"
    more = "run the same command with --resume auto to resume"  # as it was, it would start from scratch
    assert f"megasft: interrupted; {holder} holds the run: {more}" in command.said()
    assert start(world, own, options=("--resume", "auto")).wait() == 0
    assert lines(world / "other") == whole


def test_resuming_from_an_older_checkpoint_discards_the_later_ones(world):
    before = lines(world / "run")
    command = start(world, options=("--resume", f"{world}/run/checkpoints/step-000002"))
    assert command.wait() == 0
    assert "moved step-000004, adapter, best to earlier-1" in command.said()
    assert lines(world / "run") == before
    assert (world / "run" / "checkpoints" / "latest").readlink().name == "step-000004"


def test_a_run_can_resume_from_a_checkpoint_of_another_run(world):
    source = world / "run" / "checkpoints" / "step-000002"
    before = lines(world / "run")
    command = start(world, f"job.output_dir='{world}/other'", options=("--resume", str(source)))
    assert command.wait() == 0
    assert lines(world / "other") == [line for line in before if line["step"] > 2]
    assert lines(world / "run") == before
    adapters = [(world / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "other")]
    assert adapters[0] == adapters[1]
