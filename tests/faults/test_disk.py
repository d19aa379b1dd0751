"""A full or read-only disk: training continues with a warning, or stops if the run file says so."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megasft.train.checkpoint.folder import Checkpoints, damage
from megasft.train.metrics import Metrics
from megasft.train.trainer import Trainer
from tests.parallel.resume import lines, tensors
from tests.support.forked import Command
from tests.support.speech import spoken, without_progress
from tests.support.world import make_world

STEPS = 8
FIRST, FULL, FREE, LAST = "step-000002", 2, 5, "step-000008"  # steps after which the disk is full, and is not any more


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def spoil_between(disk: str, read_only: bool) -> None:
    """In a rank: rank 0 makes the disk full or read-only before step FULL + 1, and undoes that before step FREE + 1."""
    train_step = Trainer.train_step

    def spoiling(trainer: Trainer) -> dict:
        if trainer.topology.is_first and trainer.step in (FULL, FREE):
            trainer.writer.wait()
            if read_only:
                mount("-o", "remount,ro" if trainer.step == FULL else "remount,rw", disk)
            elif trainer.step == FULL:
                fill(Path(disk))
            else:
                (Path(disk) / "ballast").unlink()
        return train_step(trainer)

    Trainer.train_step = spoiling  # type: ignore[method-assign]


def spoil_the_end(disk: str) -> None:
    """In a rank: the disk is full when the final adapter is written."""
    save = Trainer.save

    def spoiling(trainer: Trainer, folder: str | Path) -> None:
        if trainer.topology.is_first and Path(folder).name == "adapter":
            fill(Path(disk))
        save(trainer, folder)

    Trainer.save = spoiling  # type: ignore[method-assign]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", "size=16m", "none", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here: that takes root, and a container that allows it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a job and, in `whole`, its run on a healthy disk."""
    folder = tmp_path_factory.mktemp("disk")
    make_world(folder, tensor=2, steps=STEPS)
    assert start(folder, folder / "whole").wait() == 0
    return folder


def start(world: Path, output: Path, *settings: str, in_rank=None, args=()) -> Command:
    own = [f"job.output_dir='{output}'", f"data.cache_dir='{world}/cache'", "checkpoint.keep=9", "lora.dropout=0.2"]
    own += ["training.validation.eval_steps=3", *settings]
    overrides = [argument for setting in own for argument in ("--set", setting)]
    arguments = ["train", "--config", str(world / "job.toml"), *overrides]
    return Command(arguments, world / f"{output.name}.err", in_rank=in_rank, args=args)


def assert_same_run(one: Path, other: Path, failed: Sequence[int] = ()) -> None:
    """The same metrics, except for checkpoints that `other` could not write, and the same results."""
    assert [line for line in lines(one) if not (line["kind"] == "checkpoint" and line["step"] in failed)] == [
        line for line in lines(other) if line["kind"] != "event"
    ]
    wanted, got = tensors(one, LAST), tensors(other, LAST)
    assert wanted.keys() == got.keys()
    assert all(value.equal(got[name]) for name, value in wanted.items())
    for adapter in ("adapter", "best"):
        assert (one / adapter / "adapter_model.safetensors").read_bytes() == (
            other / adapter / "adapter_model.safetensors"
        ).read_bytes()


def assert_intact(run: Path, *steps: str) -> None:
    checkpoints = Checkpoints(run / "checkpoints")
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", *steps]
    assert [damage(folder) for folder in checkpoints.all()] == [None] * len(steps)
    assert (checkpoints.folder / "latest").readlink().name == steps[-1]


def events(run: Path) -> list[str]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [f"{record['event']}: {record['reason']}" for record in records if record["kind"] == "event"]


def test_a_full_disk_costs_checkpoints_but_no_steps_and_no_metrics(world, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        run = disk / "full"
        command = start(world, run, in_rank=spoil_between, args=(str(disk), False))
        assert command.wait() == 0, command.said()
        assert_intact(run, FIRST, "step-000006", LAST)
        assert_same_run(world / "whole", run, failed=[4])
        assert [event.partition(":")[0] for event in events(run)] == ["best failed", "checkpoint failed"]
        assert all("No space left on device" in event for event in events(run))
        said = spoken(command.said())
        assert sum("best" in line and "training continues" in line for line in said) == 1
        assert sum("checkpoint could not be written" in line for line in said) == 1
        assert without_progress(command.said()) == "".join(f"{line}\n" for line in said), "nothing else is said"
        assert {path.name for path in run.rglob(".*")} == {".lock"}


def test_metrics_are_buffered_while_the_disk_is_full_and_written_later(tmp_path, capsys):
    with small_disk(tmp_path / "small") as disk:
        metrics = Metrics(disk, 200)
        metrics.record("event", 1, event="before", reason="x")
        fill(disk)
        for step in range(2, 100):  # more than is left of the file's last page
            metrics.record("event", step, event="meanwhile", reason="x")
        whole = (disk / "metrics.jsonl").read_bytes()
        assert metrics.length == len(whole)
        assert whole.endswith(b"\n")
        (disk / "ballast").unlink()
        metrics.record("event", 100, event="after", reason="x")
        metrics.close()
        assert [line["step"] for line in lines(disk)] == list(range(1, 101))
    assert [
        "cannot be written" in line or "can be written again" in line for line in spoken(capsys.readouterr().err)
    ] == [True] * 2


def test_a_read_only_checkpoint_folder_costs_only_checkpoints(world, tmp_path):
    run = tmp_path / "readonly"
    with small_disk(run / "checkpoints") as disk:
        command = start(world, run, in_rank=spoil_between, args=(str(disk), True))
        assert command.wait() == 0, command.said()
        assert_intact(run, FIRST, "step-000006", LAST)
        assert_same_run(world / "whole", run, failed=[4])
        assert events(run) == [
            "checkpoint failed: the last checkpoint could not be written (rank 0: Read-only file system); "
            "what was written before is intact"
        ]


def test_with_on_failure_stop_a_full_disk_ends_the_run_and_it_resumes_when_there_is_space(world, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        run = disk / "stops"
        command = start(world, run, "checkpoint.on_failure='stop'", "training.validation.save_best_model_at_end=false",
                        in_rank=spoil_between, args=(str(disk), False))  # fmt: skip
        assert command.wait() == 2
        assert sum("stopped" in line and "No space left on device" in line for line in spoken(command.said())) == 1
        assert_intact(run, FIRST)
        (disk / "ballast").unlink()
        assert start(world, run).wait() == 0
        assert_same_run(world / "whole", run)


def test_a_full_disk_at_the_final_adapter_is_one_line_and_the_same_command_finishes_it(world, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        run = disk / "end"
        command = start(world, run, in_rank=spoil_the_end, args=(str(disk),))
        assert command.wait() == 2
        assert len(spoken(command.said())) == 1
        assert "adapter cannot be written (No space left on device)" in command.said()
        assert_intact(run, FIRST, "step-000004", "step-000006", LAST)
        (disk / "ballast").unlink()
        assert start(world, run).wait() == 0
        assert_same_run(world / "whole", run)
        assert {path.name for path in run.rglob(".*")} == {".lock"}


def test_a_read_only_output_folder_is_refused_before_the_launch(world, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        mount("-o", "remount,ro", str(disk))
        command = start(world, disk / "run")
        assert command.wait() == 2
        assert len(command.said().splitlines()) == 1
        assert f"{disk} is not writable" in command.said()


def test_a_full_disk_at_the_start_is_one_line(world, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        fill(disk)
        command = start(world, disk / "run")
        assert command.wait() == 2
        assert len(spoken(command.said())) == 1
        assert "cannot be written (No space left on device)" in command.said()
        os.unlink(disk / "ballast")
