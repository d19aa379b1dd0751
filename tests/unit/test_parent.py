"""A process ends with the one that started it, and not with a thread of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = "import os, sys, time; from megasft.launch.parent import *; {body}; print('ready', flush=True); time.sleep(60)"
PARENT = """
import os, subprocess, sys, threading, time
child = lambda: subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
"""
BY_MAIN = "it = child(); it.stdout.readline(); print(it.pid, flush=True); time.sleep(60)"
BY_A_THREAD = """
def work():
    global it
    it = child()
    it.stdout.readline()
thread = threading.Thread(target=work)
thread.start()
thread.join()
time.sleep(0.3)
print(it.pid, flush=True)
time.sleep(60)
"""
# A tokenizing process whose standard input does not end with its parent.
TOKENIZING = """
import os, signal, subprocess, time
from megasft.data.tokenize import _Worker
it = _Worker()
def ignored(pid):
    return int(next(line for line in open(f"/proc/{pid}/status") if line.startswith("SigIgn")).split()[1], 16)
while not ignored(it.process.pid) >> signal.SIGINT - 1 & 1:  # it ignores Ctrl-C once it waits for work
    time.sleep(0.05)
subprocess.Popen(["sleep", "30"], pass_fds=(it.process.stdin.fileno(),))
print(it.process.pid, flush=True)
time.sleep(60)
"""


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_there(pid)


@pytest.fixture
def start():
    """`start(code)`: a Python that prints the id of its child; (itself, that id)."""
    started = []

    def begin(code: str, **environment: str) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | environment, start_new_session=True
        )
        started.append(process)
        return process, int(process.stdout.readline())

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "code",
    [PARENT.format(child=CHILD.format(body="die_with_parent(os.getppid())")) + BY_MAIN, TOKENIZING],
    ids=["any process", "a tokenizing process"],
)
def test_it_ends_when_its_parent_is_killed(start, code):
    parent, child = start(code)
    assert is_there(child)
    parent.kill()
    assert ends(child)


def test_it_outlives_the_thread_that_started_it(start):
    _, child = start(PARENT.format(child=CHILD.format(body="on_parent_death(9)")) + BY_A_THREAD)
    assert is_there(child)


# --- ranks ---

RANK = {"RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def rank(*command: str, **variables: str) -> subprocess.CompletedProcess:
    code = "from megasft.launch.parent import die_with_launcher; die_with_launcher(); print('lives')"
    return subprocess.run(
        [*command, sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )


# What it starts is left to init, like the rank of a launcher that ends before the rank's first line.
ORPHANED = ("setsid", "--fork", "--wait", "setsid", "--fork")


def test_a_rank_whose_launcher_has_ended_ends_with_a_line():
    orphan = rank(*ORPHANED, **RANK)
    assert orphan.stdout == ""
    assert orphan.stderr == "megasft: rank 1 ends, because its launcher has ended\n"


def test_a_rank_of_a_launcher_lives():
    import torch  # noqa: F401  as every launcher does

    assert rank(**RANK).stdout == "lives\n"


def test_a_rank_behind_a_wrapper_that_has_its_variables_lives():
    assert rank(*ORPHANED, "sh", "-c", '"$@"; true', "sh", **RANK).stdout == "lives\n"


def test_a_process_that_is_no_rank_is_left_alone():
    assert rank(*ORPHANED).stdout == "lives\n"
