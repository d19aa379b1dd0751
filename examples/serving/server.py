"""An HTTP server in a process of its own: started, waited for, asked, and ended with all its children."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from megasft.launch.parent import on_parent_death

LAST_LINES = 20  # of the log of a server that failed
GRACE = 20.0  # seconds from SIGTERM to SIGKILL


class ServerFailed(Exception):
    """A server that did not start or did not answer: one line, and the last lines of its log."""

    def __init__(self, line: str, log: Path) -> None:
        super().__init__(line)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        self.log = "".join(f"  | {text[:200]}\n" for text in lines)


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    name: str
    url: str
    log: Path

    def post(self, path: str, body: dict[str, Any], seconds: float = 300.0) -> Any:
        """The JSON that the server answers with. Raises ServerFailed."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            raise ServerFailed(f"{self.name} refuses {path} with status {error.code}: {said}", self.log) from None
        except (OSError, HTTPException, ValueError) as error:  # timeouts, a broken connection, no JSON
            raise ServerFailed(
                f"{self.name} does not answer {path} ({error}); its log is {self.log}", self.log
            ) from None


@contextlib.contextmanager
def serving(name: str, command: list[str], log: Path, seconds: float = 600.0) -> Iterator[Server]:
    """Run `command --port PORT`, on this machine only, until the block ends; it is entered once /health answers.

    The server ends with the block, whether by an exception, Ctrl-C or SIGTERM, and if this process is killed. Raises
    ServerFailed if it ends by itself, or is not ready after so many seconds.
    """
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=partial(on_parent_death, signal.SIGTERM),
        )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda number, _: exit(128 + number))
    try:
        server = Server(name, f"http://127.0.0.1:{port}", log)
        wait_until_ready(server, process, seconds)
        yield server
    finally:
        end(process)
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Return when /health answers 200. Raises ServerFailed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            raise ServerFailed(
                f"{server.name} ended with {how} before it was ready; its log is {server.log}", server.log
            )
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(0.25)
    raise ServerFailed(f"{server.name} was not ready after {seconds:.0f} s; its log is {server.log}", server.log)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its children: SIGTERM, and SIGKILL for those that are left; Ctrl-C does not interrupt this."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # its group outlives it where a child does
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
