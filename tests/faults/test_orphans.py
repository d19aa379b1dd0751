"""No rank outlives its launcher, from its first line on; a launcher outlives its shell."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.faults.test_ends import ROOT, TORCHRUN, wait_until
from tests.support.processes import kill_marked, marked

SECONDS = 10
SEPARATE = [sys.executable, str(ROOT / "tests" / "support" / "separate_ranks.py")]
COMMANDS = {
    "torchrun tools/train.py": [*TORCHRUN, str(ROOT / "tools" / "train.py"), "--config", "{}/job.toml"],
    "torchrun -m megasft generate": [
        *TORCHRUN, "-m", "megasft", "generate", "{}/model", "--tensor-parallel", "2", "--prompt", "a"
    ],
    "megasft train": [*SEPARATE, "train", "--config", "{}/job.toml"],
}  # fmt: skip


@pytest.fixture
def begin(world, environment):
    """`begin(command)`: (shell, mark) of a command begun from a shell."""
    marks = []

    def start(command: list[str]) -> tuple[subprocess.Popen, str]:
        marks.append(mark := uuid.uuid4().hex)
        command = ["sh", "-c", '"$@" & wait', "sh", *(word.format(world) for word in command)]
        with open(world / "log", "ab") as log:
            streams = {"stdout": log, "stderr": log}
            return subprocess.Popen(command, cwd=ROOT, env=environment | {"MARK": mark}, **streams), mark

    yield start
    for mark in marks:
        kill_marked(mark)


def imports_torch(pid: int) -> bool:
    return b"libtorch" in Path(f"/proc/{pid}/maps").read_bytes()


@pytest.mark.parametrize(
    ("command", "importing"),
    [
        ("torchrun tools/train.py", False),
        ("torchrun tools/train.py", True),
        ("torchrun -m megasft generate", True),
        ("megasft train", False),
        ("megasft train", True),
    ],
)
def test_ranks_that_start_end_with_their_launcher_and_it_outlives_its_shell(world, begin, command, importing):
    shell, mark = begin(COMMANDS[command])

    def ranks() -> list[int]:
        return [pid for pid, parent in marked(mark).items() if parent == launcher]

    wait_until(lambda: shell.pid in marked(mark).values())
    launcher = next(pid for pid, parent in marked(mark).items() if parent == shell.pid)
    wait_until(lambda: len(ranks()) == 2 and (not importing or all(map(imports_torch, ranks()))))
    if importing:
        shell.kill()
        shell.wait()
        time.sleep(0.2)
        assert {launcher, *ranks()} == set(marked(mark))
        assert len(ranks()) == 2
    os.kill(launcher, signal.SIGKILL)
    wait_until(lambda: not set(marked(mark)) - {shell.pid}, SECONDS)
    assert "Traceback" not in (world / "log").read_text()
