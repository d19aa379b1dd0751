"""Launching the ranks of a job on this machine: this command once for each rank, as torchrun would, with one ending.

The launcher hosts the ranks' rendezvous store and waits. It differs from torchrun in how it ends: without a report of
its own, with the exit code of the rank that failed. On CPUs it imports what ranks need once and forks them.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from megasft.launch import rendezvous
from megasft.launch.exit import FAILED, INTERRUPTED, first_to_report
from megasft.launch.forked_rank import ForkedRank
from megasft.messages import say

STOP_SECONDS = 15.0  # from asking the ranks to end, because one has, to killing them; one in a collective takes some 7
SAVE_SECONDS = 600.0  # from asking them to save the run and end to killing them; a second signal does it at once
ASK_AGAIN_SECONDS = 2.0

Process = subprocess.Popen | ForkedRank


def launch(
    ranks: int,
    interrupted: str,
    main: Callable[[], None],
    preload: Callable[[], None],
    max_restarts: int = 0,
    asks_rank_0: bool = False,
) -> None:
    """Run this process's command line on `ranks` ranks; exits with the code of the first that fails, if one does.

    A run that fails, other than by a user's mistake, is restarted up to `max_restarts` times, from its last checkpoint.
    Signals end it, with the words `interrupted` unless a rank has others. With `asks_rank_0` Ctrl-C goes to that rank,
    as SIGUSR2, which decides what to end, such as an answer and not the chat; a second Ctrl-C within two seconds ends
    the job all the same. For ranks that are forked, `main` is the command itself and `preload` imports what it uses.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    for attempt in range(max_restarts + 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # part of the keys under which the ranks meet
        try:
            code = _attempt(ranks, interrupted, main, preload, signals, asks_rank_0)
        finally:
            _show_cursor()
        if code != FAILED or attempt == max_restarts:
            break
        say(f"restart {attempt + 1} of {max_restarts}, from the last checkpoint")
    if code:
        sys.exit(code)


def use_cores(ranks: int) -> None:
    """Share the cores between the ranks; call it before numpy and torch are imported, which read it then."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def _attempt(
    ranks: int,
    interrupted: str,
    main: Callable[[], None],
    preload: Callable[[], None],
    signals: list[int],
    asks_rank_0: bool,
) -> int:
    """The exit code of the first rank that fails, 0 if none does."""
    from torch.distributed import TCPStore

    os.environ[rendezvous.LAUNCH] = uuid.uuid4().hex
    # Listening before the ranks are started, and a store only afterwards: it has a thread, and threads do not fork.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        processes = _start(ranks, port, main, preload, listener)
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    asked = -math.inf
    try:
        rendezvous.claim(store, os.environ[rendezvous.LAUNCH], os.getpid())
        while not any(codes := [process.poll() for process in processes]):
            if None not in codes:
                return 0
            if asks_rank_0 and signals[:1] == [signal.SIGINT] and time.monotonic() > asked + ASK_AGAIN_SECONDS:
                signals.clear()
                asked = time.monotonic()
                processes[0].send_signal(signal.SIGUSR2)
            elif signals:
                break
            time.sleep(0.1)
        killed = next((rank for rank, code in enumerate(codes) if code and code < 0), None)
        if signals:
            signals.clear()
            for process in processes:
                process.terminate()
            _wait(processes, SAVE_SECONDS, signals)  # a rank reports what became of the run
            for process in processes:
                process.kill()  # those left after a second signal, or after so long
            if first_to_report(store, "launcher"):
                say(interrupted)
            return INTERRUPTED
        if killed is not None:
            by = -(codes[killed] or 0)
            if first_to_report(store, "launcher"):
                say(f"lost rank {killed} to signal {by} ({signal.strsignal(by)}); out of memory?")
            return FAILED
        return next(code for code in codes if code)
    finally:
        for process in processes:
            process.terminate()
        _wait(processes, STOP_SECONDS)
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[Process], seconds: float, signals: Sequence[int] = ()) -> None:
    """Wait until all have ended, or for so long, or for a signal."""
    deadline = time.monotonic() + seconds
    while not signals and time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)


def _start(
    ranks: int, port: int, main: Callable[[], None], preload: Callable[[], None], listener: socket.socket
) -> Sequence[Process]:
    use_cores(ranks)
    from megasft import host

    if forks := not host.CUDA:
        preload()
        forks = len(os.listdir("/proc/self/task")) == 1  # thread pools, of OpenMP for one, do not survive a fork
    world = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    places = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with _ctrl_c_blocked():
        if not forks:
            return [subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | place) for place in places]

        def command() -> None:
            listener.close()  # the launcher's alone: its port must close with it
            main()

        return [ForkedRank(command, place) for place in places]


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Start ranks with SIGINT and SIGUSR2 blocked.

    A terminal's Ctrl-C goes to all of its processes, but must end a rank only through the launcher: one that is still
    importing would print a traceback. SIGUSR2 must find the rank ready, too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show_cursor() -> None:
    """For ranks that were killed while they showed a progress bar, which hides it."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)
