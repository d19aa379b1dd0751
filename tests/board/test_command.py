"""`megasft dashboard` as it is started: over a real socket."""

import contextlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.made_runs import make_run


def raw(port: int, request: bytes) -> bytes:
    """The answer to a request sent as it is; b"" where the connection is reset."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request)
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.fixture
def dashboard(tmp_path):
    """A running dashboard of one run, and a secret beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    make_run(tmp_path / "runs" / "run", steps=20)
    command = [sys.executable, "-m", "megasft", "dashboard", str(tmp_path / "runs"), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.kill()
        server.communicate(timeout=20)


def test_the_command_serves_on_loopback_refuses_raw_hostile_requests_and_ends_on_ctrl_c(dashboard):
    line = dashboard.stderr.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ shows the runs \(1 so far\)", line)[1])
    end = b" HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n" % port
    assert raw(port, b"GET /api/runs" + end).startswith(b"HTTP/1.1 200")
    for path in (
        b"/../secret.txt",
        b"/../../../../../../etc/passwd",
        b"/%2e%2e/secret.txt",
        b"/..%2f..%2fetc/passwd",
        b"/\\..\\secret.txt",
    ):
        answer = raw(port, b"GET " + path + end)
        assert answer.startswith(b"HTTP/1.1 404"), path
        assert b"root:" not in answer
    assert raw(port, b"GET /" + b"x" * 20_000 + end).startswith(b"HTTP/1.1 414")
    assert raw(port, b"GET /" + b"x" * 200_000 + end)[:12] in (b"HTTP/1.1 400", b"")
    foreign = b" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    for request in (b"GET /" + foreign, b"GET http://evil.example/" + foreign, b"GET / HTTP/1.0\r\n\r\n"):
        assert raw(port, request).startswith(b"HTTP/1.1 421")
    assert raw(port, b"POST /" + end).startswith(b"HTTP/1.1 405")
    assert raw(port, b"\x00\xff\r\n\r\n")[:12] in (b"HTTP/1.1 400", b"")
    with pytest.raises(ConnectionRefusedError):  # it listens at this one address
        socket.create_connection(("127.0.0.2", port), timeout=5)
    dashboard.send_signal(signal.SIGINT)
    assert dashboard.wait(20) == 0


def test_a_port_in_use_and_a_missing_folder_are_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "megasft", "dashboard", "--port", port], cwd=tmp_path, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"megasft: --host 127.0.0.1 --port {port}: cannot be used (Address already in use); --port 0 takes a free one\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "megasft", "dashboard", "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "megasft: nowhere: no such folder; name run directories, or folders that hold them\n"
