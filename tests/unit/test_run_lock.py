"""One job in an output folder at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megasft.messages import UserError
from megasft.train.checkpoint import run_lock

# It leaves a child behind, as the processes are that tokenize.
HOLDER = """
import os, sys, time
from megasft.train.checkpoint import run_lock
run_lock.hold(sys.argv[1])
if os.fork():
    print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """`holder(seconds)`: start a process that locks `tmp_path` for that long."""
    begun = []

    def begin(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), str(seconds)]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        assert begun[-1].stdout.readline() == b"held\n"
        return begun[-1]

    yield begin
    run_lock.release(tmp_path)
    for process in begun:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_job_is_refused_with_host_and_process_of_the_first(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.2)
    first = holder(60)
    with pytest.raises(UserError, match=rf"output_dir = '{tmp_path}': process {first.pid} on {os.uname().nodename} is"):
        run_lock.hold(tmp_path)


def test_a_killed_job_releases_its_folder_although_its_children_live(tmp_path, holder, capfd):
    first = holder(60)
    first.kill()
    first.wait()
    run_lock.hold(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_job_that_is_about_to_end_is_waited_for(tmp_path, holder, capfd):
    first = holder(1.0)
    started = time.monotonic()
    run_lock.hold(tmp_path)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err.count(f"process {first.pid} on ") == 1


def test_a_folder_is_free_after_its_job_releases_it(tmp_path):
    for _ in range(2):
        run_lock.hold(tmp_path)
        run_lock.hold(tmp_path)  # once more by the same job
        run_lock.release(tmp_path)
    assert subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path), "0"], check=True, capture_output=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file/run cannot be written"):
        run_lock.hold(tmp_path / "file" / "run")
