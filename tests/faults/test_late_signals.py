"""A signal that comes as a run ends: it is done or saved, never a traceback, and the same command ends well."""

import os
import signal
import threading
import time

import pytest

from megasft import rank
from megasft.train.run_log import RunLog
from tests.parallel.resume import lines
from tests.support.forked import Command


def patched(owner, name, late):
    original = getattr(owner, name)

    def then(*args):
        late(original, *args)

    setattr(owner, name, then)


def closes_its_log_and(kill):
    """Two seconds pass between the end of training and the end of the rank; `kill` is called as they begin."""

    def late(close, log):
        close(log)
        kill()
        time.sleep(2)

    patched(RunLog, "close", late)


def lose_the_launcher():
    closes_its_log_and(lambda: os.environ["RANK"] == "0" and os.kill(os.getppid(), signal.SIGKILL))


def hear_a_signal():
    closes_its_log_and(lambda: os.environ["RANK"] == "0" and os.kill(os.getpid(), signal.SIGTERM))


def hear_a_signal_when_done():
    def late(succeed, ending):
        succeed(ending)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4)  # longer than the listening thread waits before it interrupts the main one

    patched(rank._Ending, "succeed", late)


def hear_a_signal_when_the_other_rank_is_done():
    """Rank 1 saves the run, which it cannot without rank 0."""
    if os.environ["RANK"] == "1":
        closes_its_log_and(lambda: threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start())


CASES = [
    (lose_the_launcher, -signal.SIGKILL),
    (hear_a_signal, 130),
    (hear_a_signal_when_done, 0),
    (hear_a_signal_when_the_other_rank_is_done, 0),
]


@pytest.mark.parametrize(("fault", "code"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_signal_after_the_last_step_leaves_a_run_that_is_done_or_can_be_resumed(world, tmp_path, fault, code):
    words = ["train", "--config", str(world / "job.toml")]
    command = Command(words, tmp_path / "errors", in_rank=fault)
    assert command.wait() == code, command.said()
    assert "Traceback" not in command.said()
    assert (world / "run" / "adapter" / "adapter_model.safetensors").exists()
    trained = lines(world / "run")
    if code:
        assert Command(words, tmp_path / "again").wait() == 0
        assert [line for line in lines(world / "run") if line["kind"] == "train"] == [
            line for line in trained if line["kind"] == "train"
        ]
    assert trained[-1]["kind"] == "checkpoint"
