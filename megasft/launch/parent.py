"""Ranks and workers that end when the process that started them does, however it ends: the kernel signals them."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from megasft.messages import say

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def die_with_launcher() -> None:
    """End this process when its launcher does; call it first in a rank. It does nothing in a process that is no rank.

    torchrun and `megasft train` set the variable. Other launchers may start ranks from a thread that ends before them.
    """
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return
    on_parent_death(signal.SIGKILL)
    if not _has_launcher():  # it ended before
        say(f"rank {os.environ.get('RANK')} ends, because its launcher has ended")
        os._exit(1)


def die_with_parent(parent: int) -> None:
    """End this process when `parent`, its parent, does."""
    on_parent_death(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def on_parent_death(number: int) -> None:
    """Have the kernel send this process the signal `number` when its parent ends, in place of one asked for before.

    The kernel does so when the thread ends that started this process. If that was not the parent's main thread, the
    parent may outlive it, and no signal is sent.
    """
    if not _started_by_a_thread():
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)


def _started_by_a_thread() -> bool:
    """Whether the parent started this process from another thread than its main one, which is still there.

    Where a process is killed, its main thread ends first, and for a moment its children are another thread's.
    """
    me, parent = str(os.getpid()), str(os.getppid())
    threads = Path(f"/proc/{parent}/task")
    for children in threads.glob("*/children"):  # absent if the kernel keeps no such list
        with contextlib.suppress(OSError):  # the thread has ended
            if children.parent.name != parent and me in children.read_text().split():
                return (threads / parent / "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def _has_launcher() -> bool:
    """Whether a launcher is among this rank's ancestors. init, or whatever else adopts an orphan, is none.

    A launcher has loaded torch. A wrapper that it starts in a rank's place, such as a profiler, has a rank's
    environment. A process that cannot be looked into is taken for one, unless it is the first, which adopts orphans.
    """
    process = os.getppid()
    while process:
        folder = Path(f"/proc/{process}")
        try:
            if b"libtorch" in (folder / "maps").read_bytes():
                return True
            if b"TORCHELASTIC_USE_AGENT_STORE=" in (folder / "environ").read_bytes():
                return True
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return process != 1
    return False
