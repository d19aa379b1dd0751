"""The processes of a job, found by a mark in their environment: MARK, given to its launcher and inherited by all."""

import contextlib
import os
import signal
from pathlib import Path


def marked(mark: str) -> dict[int, int]:
    """{process: its parent} of all that have not ended. Forked ones have the environment that their launcher was given."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(folder.name)] = int(parent)
    return found


def kill_marked(mark: str) -> None:
    """End them all."""
    while found := marked(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
