"""Loading weights shows how far it is: lines in a log, a bar on a terminal, on rank 0 alone."""

import os
import pty

import pytest

from megasft.model import load_base


def progress(sizes: list[int]) -> None:
    with load_base._progress("models/base", sum(sizes)) as report:
        for size in sizes:
            report(size)


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 11.0, 11.0, 12.0, 22.0, 22.0])
    monkeypatch.setattr("megasft.model.load_base.time.monotonic", lambda: next(clock))
    progress([10**9, 10**9, 10**9, 10**9])
    assert capsys.readouterr().err.splitlines() == [
        "models/base: 50% of rank 0's 4.00 billion weights loaded",
        "models/base: 100% of rank 0's 4.00 billion weights loaded",
    ]


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_terminal_gets_a_bar_from_rank_0(monkeypatch, rank):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        progress([1, 1])
        stream.write("end")
        stream.flush()
        shown = ""
        while not shown.endswith("end"):
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert ("loading weights" in shown) == (rank == "0")
    if rank == "0":
        assert "100%" in shown
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
