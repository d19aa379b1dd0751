"""examples/serving/server.py: servers are waited for, and end with whoever started them. Comparing what they answer."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving"
sys.path.insert(0, str(EXAMPLE))
from server import ServerFailed, serving

# Answers /health, refuses everything else; its child writes its process id to a file and outlives SIGTERM.
FAKE = """
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
CHILD = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
with open(sys.argv[1], "w") as file:
    subprocess.Popen([sys.executable, "-c", CHILD], stdout=file)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.send_response(418); self.end_headers(); self.wfile.write(b"no\\n tea")
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
"""


def pid_of_child(file: Path) -> int:
    for _ in range(200):
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text())
        time.sleep(0.05)
    raise AssertionError("the server's child did not start")


def assert_ends(pid: int) -> None:
    for _ in range(200):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    raise AssertionError(f"process {pid} is left")


def test_a_server_ends_with_its_children_when_the_block_does(tmp_path):
    command = [sys.executable, "-c", FAKE, str(tmp_path / "pid")]
    with serving("fake", command, tmp_path / "log", seconds=30) as server:
        child = pid_of_child(tmp_path / "pid")
        with pytest.raises(ServerFailed, match="fake refuses /v1/completions with status 418: no tea"):
            server.post("/v1/completions", {})
    assert_ends(child)


ASKING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from server import serving
with serving("fake", [sys.executable, "-c", sys.argv[2], sys.argv[3]], Path(sys.argv[3] + ".log"), seconds=30):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_when_the_script_is_told_to(tmp_path, number):
    command = [sys.executable, "-c", ASKING, EXAMPLE, FAKE, tmp_path / "pid"]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert script.stdout.readline() == b"ready\n"
    child = pid_of_child(tmp_path / "pid")
    script.send_signal(number)
    assert script.wait(30) in (-number, 128 + number)
    assert_ends(child)


def test_a_server_ends_when_the_script_is_killed(tmp_path):
    """Its own children are its own to end."""
    sleeper = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(600)"
    command = [sys.executable, "-c", ASKING, EXAMPLE, sleeper, tmp_path / "pid"]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    server = pid_of_child(tmp_path / "pid")
    script.kill()
    script.wait(30)
    assert_ends(server)


def test_a_server_that_ends_by_itself_is_a_line_with_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; [print('line', i) for i in range(50)]; sys.exit(3)"]
    with pytest.raises(ServerFailed, match="fake ended with exit code 3 before it was ready") as failed:  # noqa: SIM117
        with serving("fake", command, tmp_path / "log"):
            pass
    assert failed.value.log.splitlines()[-1] == "  | line 49"
    assert len(failed.value.log.splitlines()) == 20


def test_a_server_that_is_never_ready_is_ended(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = time.monotonic()
    with pytest.raises(ServerFailed, match="fake was not ready after 1 s"):  # noqa: SIM117
        with serving("fake", command, tmp_path / "log", seconds=1):
            pass
    assert time.monotonic() - started < 15


def test_answers_are_compared_to_the_last_token():
    from check_served import Row
    from engines import Prompt, Reply

    prompt, stop = Prompt([], None, {}, ids=[1, 2, 3], text=""), frozenset({9})
    cases = {
        "": Reply([5, 6, 9], "stop", 3, "messages"),
        " ": Reply([5, 6], "stop", 3, "messages"),
        "answer 1: token 2 differs": Reply([5, 7, 9], "stop", 3, "messages"),
        "answer 1: token 3 differs": Reply([5, 6, 6], "length", 3, "messages"),
        "answer 1: token 2 differs ": Reply([5], "stop", 3, "messages"),
        "answer 1: it ended by length": Reply([5, 6], "length", 3, "messages"),
        "answer 1: its prompt has 4 tokens, not 3": Reply([5, 6, 9], "stop", 4, "messages"),
    }
    for words, reply in cases.items():
        row = Row("server", "model")
        row.add(1, prompt, reply, [5, 6, 9], stop)
        assert row.first == words.strip()
        assert row.equal == (not words.strip())
