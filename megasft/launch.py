"""Launching the ranks of a job on this machine: this same command once for each rank, as torchrun would, and one end.

The launcher hosts the ranks' rendezvous store and waits. It differs from torchrun in how it ends: without a report of
its own, with the exit code of the rank that failed.
"""

import os
import signal
import subprocess
import sys
import time

from megasft.config import RunConfig
from megasft.ending import FAILED, INTERRUPTED, first_to_tell, say

STOP_SECONDS = 15.0  # from asking a rank to end to killing it; it takes some 7 where it waits in a collective


def launch(config: RunConfig, ranks: int) -> None:
    """Run this process's command line on `ranks` ranks; exits with the code of the first that fails, if one does."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    processes = _start(ranks, store.port)
    try:
        codes = [process.poll() for process in processes]
        while not signals and not any(codes):
            if None not in codes:
                return
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
        code, reason = next((code for code in codes if code), FAILED), ""
        killed = next((rank for rank, code in enumerate(codes) if code and code < 0), None)
        if signals:
            code, reason = INTERRUPTED, f"interrupted; adapters saved so far are under {config.job.output_dir}"
        elif killed is not None:
            code, by = FAILED, -(codes[killed] or 0)
            reason = f"lost rank {killed} to signal {by} ({signal.strsignal(by)}); out of memory?"
        if reason and first_to_tell(store, "launcher"):
            say(reason)
    finally:
        _stop(processes)
    sys.exit(code)


def _start(ranks: int, port: int) -> list[subprocess.Popen]:
    world = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    world.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # A blocked signal is inherited: a terminal's Ctrl-C, which goes to all of its processes, must end a rank only
    # through the launcher, or a rank that is still importing prints a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [
            subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(ranks)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
