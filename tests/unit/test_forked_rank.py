"""A forked rank ends as a process of its own would, and never outlives its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The child runs `body`, its parent `then`.
PARENT = """
import os, signal, sys, time
from megasft.launch.forked_rank import ForkedRank

def main():
    assert os.environ["RANK"] == "3"
    {body}

signal.signal(signal.SIGTERM, lambda *_: print("the launcher's handler", flush=True))
rank = ForkedRank(main, {{"RANK": "3"}})
{then}
"""


def parent(body: str, then: str = "print(rank.wait(), flush=True)") -> subprocess.Popen:
    code = PARENT.format(body=body, then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "printed"),
    [
        ("print('done')", 0, "done"),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('a reason')", 1, ""),
        ("raise RuntimeError('broken')", 1, ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
    ],
    ids=["done", "exit code", "exit with words", "an exception", "a signal, which is not the launcher's to handle"],
)
def test_a_forked_rank_has_the_exit_code_of_a_separate_process(body, code, printed):
    said, errors = parent(body).communicate(timeout=60)
    assert said.splitlines() == [*([printed] if printed else []), str(code)]
    assert ("RuntimeError: broken" in errors) == ("RuntimeError" in body)


def test_a_rank_dies_with_a_launcher_that_is_killed():
    launcher = parent("time.sleep(600)", "print(rank.pid, flush=True); time.sleep(600)")
    rank = int(launcher.stdout.readline())
    assert Path(f"/proc/{rank}").exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{rank}").exists() and Path(f"/proc/{rank}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)
    assert rank != os.getpid()
