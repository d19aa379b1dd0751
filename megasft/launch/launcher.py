"""Launching the ranks of a job on this machine: this same command once for each rank, as torchrun would, and one end.

The launcher hosts the ranks' rendezvous store and waits. It differs from torchrun in how it ends: without a report of
its own, with the exit code of the rank that failed.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from megasft.launch.exit import FAILED, INTERRUPTED, first_to_tell
from megasft.messages import say

STOP_SECONDS = 15.0  # from asking the ranks to end, because one has, to killing them; one in a collective takes some 7
SAVE_SECONDS = 600.0  # from asking them to save the run and end to killing them; a second signal does it at once
ASK_AGAIN_SECONDS = 2.0


def launch(ranks: int, interrupted: str, max_restarts: int = 0, asks_rank_0: bool = False) -> None:
    """Run this process's command line on `ranks` ranks; exits with the code of the first that fails, if one does.

    A run that fails, other than by a user's mistake, is begun again up to `max_restarts` times, from its last
    checkpoint. Signals end it, with the words `interrupted` unless a rank has others. With `asks_rank_0` that rank
    hears of Ctrl-C, by SIGUSR2, and does what is right, such as ending an answer and not the chat; a second Ctrl-C
    within two seconds ends the job all the same.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    for attempt in range(max_restarts + 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # what the ranks tell each other is of this attempt
        code = _attempt(ranks, interrupted, signals, asks_rank_0)
        if code != FAILED or attempt == max_restarts:
            break
        say(f"restart {attempt + 1} of {max_restarts}, from the last checkpoint")
    if code:
        sys.exit(code)


def _attempt(ranks: int, interrupted: str, signals: list[int], asks_rank_0: bool) -> int:
    """The exit code of the first rank that fails, 0 if none does."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = _start(ranks, store.port)
    asked = -math.inf
    try:
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
            _wait(processes, SAVE_SECONDS, signals)  # a rank says what has become of the run
            for process in processes:
                process.kill()  # those left after a second signal, or after so long
            if first_to_tell(store, "launcher"):
                say(interrupted)
            return INTERRUPTED
        if killed is not None:
            by = -(codes[killed] or 0)
            if first_to_tell(store, "launcher"):
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


def _wait(processes: list[subprocess.Popen], seconds: float, signals: Sequence[int] = ()) -> None:
    """Wait until all have ended, or for so long, or for a signal."""
    deadline = time.monotonic() + seconds
    while not signals and time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)


def _start(ranks: int, port: int) -> list[subprocess.Popen]:
    world = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    world.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # A blocked signal is inherited: a terminal's Ctrl-C, which goes to all of its processes, must end a rank only
    # through the launcher, or a rank that is still importing prints a traceback. SIGUSR2 must find it ready, too.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR2})
    try:
        return [
            subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(ranks)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
