"""However a job ends, all its processes end within 30 seconds, and one line says why.

A launcher is started as a user starts it for a refusal, for a killed rank under torchrun and for a Ctrl-C as the ranks start;
elsewhere `megasft train` and torchrun are forked from a process that has imported everything.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megasft.train.checkpoint.folder import damage
from tests.parallel.resume import lines
from tests.support.forked import Command, Torchrun
from tests.support.speech import spoken, without_progress

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MISBEHAVE = [str(ROOT / "tests" / "support" / "misbehave.py"), "train"]
RANKS = ["--nproc-per-node", "2"]
TORCHRUN = [str(BIN / "torchrun"), *RANKS]
ENDLESS = "hyperparameters.max_steps=100000"


@pytest.fixture
def start(world, environment) -> Callable[..., subprocess.Popen]:
    """`start(command, *settings)`: start the job of `world` in its own process group, as a terminal does."""
    started = []

    def begin(command: list[str], *settings: str) -> subprocess.Popen:
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        command = [*command, "--config", str(world / "job.toml"), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
    for pid in processes_of(world):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fork(world) -> Callable[..., Command]:
    """`fork(*settings, options=())`: start the job of `world` as a forked `megasft train` that can misbehave."""
    started = []

    def begin(*settings: str, options: tuple[str, ...] = ()) -> Command:
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        words = ["train", "--config", str(world / "job.toml"), *overrides, *options]
        started.append(Command(words, world / f"errors-{len(started)}", in_rank=misbehave))
        return started[-1]

    yield begin
    for command in started:
        command.kill()


@pytest.fixture
def fork_torchrun(world) -> Callable[..., Torchrun]:
    """`fork_torchrun(script, *settings)`: the same by torchrun, of a script with its arguments."""
    started = []

    def begin(script: list[str], *settings: str) -> Torchrun:
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        words = [*RANKS, *script, "--config", str(world / "job.toml"), *overrides]
        started.append(Torchrun(words, world / f"torchrun-errors-{len(started)}"))
        return started[-1]

    yield begin
    for command in started:
        command.kill()


def misbehave() -> None:
    import tests.support.misbehave  # noqa: F401


def processes_of(world: Path) -> list[int]:
    """All processes whose command line names the run file: launcher and ranks, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(world / "job.toml").encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def finish(process: subprocess.Popen, world: Path, seconds: float) -> tuple[int, str]:
    """(exit code, standard error) of the launcher, once it and all ranks have ended within so many seconds."""
    wait_until(lambda: process.poll() is not None and not processes_of(world), seconds)
    return process.returncode, process.communicate()[1]


def steps(world: Path) -> int:
    """The number of steps that the job has logged."""
    metrics = world / "run" / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


SAVED = r"megasft: interrupted; (\S+) holds the run: run the same command to resume"
NOT_BEGUN = "megasft: interrupted; checkpoints written before are under {}/run"


def assert_saved(world: Path, line: str) -> None:
    """Assert that the line names an intact checkpoint of the last logged step."""
    match = re.fullmatch(SAVED, line)
    assert match, line
    folder = Path(match[1])
    assert damage(folder) is None
    assert folder.name == f"step-{steps(world):06d}" == (folder.parent / "latest").readlink().name


def assert_adapters_are_whole(world: Path) -> None:
    adapters = [path.parent for path in (world / "run").glob("**/adapter_config.json")]
    adapters = [path for path in adapters if not path.name.startswith(".")]  # the rest of one that was being replaced
    assert adapters
    for adapter in adapters:
        assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
        assert load_file(adapter / "adapter_model.safetensors")


# --- refusals ---


def test_megasft_train_refuses_with_one_line_and_nothing_else(world, start):
    weights = world / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    process = start([str(BIN / "megasft"), "train"])
    code, said = finish(process, world, 120)
    assert re.fullmatch(r"megasft: .*model\.safetensors: corrupted.*\n", said)
    assert code == 2


def test_the_script_without_torchrun_exits_with_its_ranks_refusal(world, start):
    (world / "train.jsonl").write_text("{}\n")
    code, said = finish(start([sys.executable, str(ROOT / "tools" / "train.py")]), world, 120)
    assert re.fullmatch(r"megasft: .*train\.jsonl:1: .*\n", said)
    assert code == 2


def test_under_torchrun_the_error_is_printed_once_and_every_rank_exits_with_2(world, fork_torchrun):
    (world / "train.jsonl").write_text("{}\n")
    command = fork_torchrun([str(ROOT / "tools" / "train.py")])
    assert command.wait() == 1, "torchrun's own"
    said = command.said()
    assert len(spoken(said)) == said.count("train.jsonl:1") == 1
    assert re.findall(r"exitcode  : (\S+)", said) == ["2", "2"]


# --- crashes ---


def test_a_crash_of_one_rank_ends_all_with_one_traceback(world, fork):
    command = fork("tags.fault=fail", ENDLESS)
    assert command.wait() == 1
    assert command.said().count("RuntimeError: the fault of rank 1\n") == command.said().count("Traceback") == 1
    assert spoken(command.said()) == ["megasft: rank 1 failed, as traced above"]


def test_a_killed_rank_ends_all_and_is_reported_in_one_line(world, fork):
    command = fork("tags.fault='be killed'", ENDLESS)
    assert command.wait() == 1
    assert without_progress(command.said()) == "megasft: lost rank 1 to signal 9 (Killed); out of memory?\n"


def test_a_crash_under_torchrun_ends_all_with_one_traceback(world, fork_torchrun):
    command = fork_torchrun(MISBEHAVE, "tags.fault=fail", ENDLESS)
    assert command.wait() == 1
    assert command.said().count("RuntimeError: the fault of rank 1\n") == 1
    assert spoken(command.said()) == ["megasft: rank 1 failed, as traced above"]


def test_a_killed_rank_under_torchrun_ends_all_and_is_reported_in_one_line(world, start):
    process = start([*TORCHRUN, *MISBEHAVE], "tags.fault='be killed'", ENDLESS)
    wait_until(lambda: steps(world) or process.poll() is not None)
    code, said = finish(process, world, 30)
    assert code == 1
    assert "RuntimeError: the fault" not in said
    (line,) = spoken(said)
    assert line.startswith("megasft: rank 0 lost another rank, ")


# --- interruptions ---


def test_ctrl_c_ends_all_ranks_and_leaves_complete_adapters(world, fork):
    command = fork(ENDLESS)
    wait_until(lambda: steps(world) > 3)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does
    assert command.wait() == 130
    (line,) = spoken(command.said())
    assert without_progress(command.said()) == line + "\n"
    assert_saved(world, line)
    assert_adapters_are_whole(world)


def test_ctrl_c_under_torchrun_too(world, fork_torchrun):
    command = fork_torchrun(MISBEHAVE, ENDLESS)
    wait_until(lambda: steps(world) > 3)
    os.killpg(command.pid, signal.SIGINT)  # torchrun alone: its ranks have sessions of their own
    command.wait()
    (line,) = spoken(command.said())
    assert_saved(world, line)
    assert_adapters_are_whole(world)


def test_ctrl_c_while_the_ranks_start_is_quiet_too(world, start):
    process = start([sys.executable, *MISBEHAVE])
    wait_until(lambda: len(processes_of(world)) == 3)
    os.killpg(process.pid, signal.SIGINT)
    code, said = finish(process, world, 30)
    assert without_progress(said) == NOT_BEGUN.format(world) + "\n"
    assert code == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["is told to stop", "is killed"])
def test_ranks_that_wait_for_each_other_end_when_the_launcher(world, fork, number):
    command = fork("tags.fault=hang", ENDLESS)
    wait_until(lambda: steps(world))
    time.sleep(1)  # now each waits for the other
    os.kill(command.pid, number)
    assert command.wait() == (130 if number == signal.SIGTERM else -number)
    (line,) = spoken(command.said())
    assert_saved(world, line)
    assert "Traceback" not in command.said()


def test_a_second_ctrl_c_ends_ranks_that_cannot_save_at_once(world, fork):
    command = fork(ENDLESS)
    wait_until(lambda: steps(world) > 1)
    for rank in command.ranks():
        os.kill(rank, signal.SIGSTOP)
    os.kill(command.pid, signal.SIGINT)
    time.sleep(1)
    assert command.pid in command.alive(), "it waits for them to save"
    os.kill(command.pid, signal.SIGINT)
    begun = time.monotonic()
    assert command.wait() == 130
    assert time.monotonic() - begun < 20, "of the minutes that it would wait for them to save"
    assert spoken(command.said()) == [NOT_BEGUN.format(world)]


# --- and go on ---


def test_a_run_that_was_stopped_and_then_crashed_ends_like_an_uninterrupted_one(world, fork):
    settings = ("lora.dropout=0.2", "hyperparameters.max_steps=12", "checkpoint.keep=9")
    whole = fork(*settings, f"job.output_dir='{world}/whole'")
    assert whole.wait() == 0, whole.said()

    command = fork(*settings)
    wait_until(lambda: steps(world) > 2)
    os.kill(command.ranks()[0], signal.SIGUSR1)  # one rank alone: it tells the others
    assert command.wait() == 130
    assert_saved(world, *spoken(command.said()))
    stopped = steps(world)
    assert stopped < 12

    crash = f"tags={{fault='be killed', fault_after={stopped + 2}}}"
    command = fork(*settings, crash, options=("--max-restarts", "1"))
    assert command.wait() == 0, command.said()
    told = spoken(command.said())
    assert told[0].startswith(f"megasft: resuming from {world}/run/checkpoints/step-{stopped:06d}: {stopped} of 12")
    assert told[1:3] == [
        "megasft: lost rank 1 to signal 9 (Killed); out of memory?",
        "megasft: restart 1 of 1, from the last checkpoint",
    ]
    assert len(told) == 4
    assert lines(world / "run") == lines(world / "whole")
    ended = [(world / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert ended[0] == ended[1]
