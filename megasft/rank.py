"""One rank of a job: runs it, and ends it so that the first error is told once and nobody hangs."""

import _thread
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

from megasft import job
from megasft.config.schema import RunConfig
from megasft.distributed.topology import leave_world
from megasft.launch import rendezvous
from megasft.launch.exit import FAILED, INTERRUPTED, REFUSED, ask_to_stop, first_to_tell, has_been_told, interrupted
from megasft.launch.watchdog import Watchdog
from megasft.messages import UserError, say
from megasft.train.trainer import Summary, Trainer

# What gloo and NCCL say when the process at the other end of a connection is gone.
LOST_PEER = re.compile("closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)


def train(config: RunConfig) -> None:
    """Train as the rank that the environment names."""

    def run(on_start: Callable[[Trainer], None]) -> None:
        summary = job.run(config, on_start)
        if dist.get_rank() == 0:
            print_summary(summary, config)

    run_rank(run, interrupted(config), config.job.timeout_minutes)


def run_rank(run: Callable[[Callable[[Trainer], None]], None], interrupted: str, timeout_minutes: float = 10.0) -> None:
    """Run a job as one of its ranks; exits the process unless it succeeds.

    `run` is given a function to hand a trainer to, if there is one to save; `interrupted` is said of a job without.
    Ranks that stand still for `timeout_minutes` end all.
    Exit codes: 0 done, 2 refused (a user's mistake), 130 interrupted, 1 failed. SIGINT, SIGTERM and SIGUSR1 to any rank
    interrupt all; in training the run is saved as it was after the last step, whatever the one under way waits for.
    """
    ending = _Ending(interrupted, timeout_minutes)
    try:
        run(ending.attach)
    except UserError as error:
        ending.end(REFUSED, str(error))
    except KeyboardInterrupt:
        ending.interrupt()
    except BaseException as error:
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            ending.lose_peer()
        ending.end(FAILED, f"rank {ending.rank} failed, as traced above", traceback.format_exc())
    ending.succeed()
    leave_world()


class _Ending:
    """How this rank ends before its time: heeds signals and the launcher's death; speaks if no other has."""

    def __init__(self, interrupted: str, timeout_minutes: float) -> None:
        self.rank, self._interrupted = os.environ["RANK"], interrupted
        self._lock = threading.Lock()
        self._trainer: Trainer | None = None
        self._saving = threading.Event()
        self._store = rendezvous.store()
        self._watch = Watchdog(int(self.rank), int(os.environ["WORLD_SIZE"]), 60 * timeout_minutes)
        if self._store is not None:  # so there is a launcher: to end with it, if it is killed, is to be told to stop
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
        self._heed_signals()

    def attach(self, trainer: Trainer) -> None:
        """From now on there is a run to save."""
        self._trainer = trainer
        self._watch.attach(trainer.progress)

    def succeed(self) -> None:
        """This rank has done its part."""
        self._watch.detach()

    def interrupt(self) -> NoReturn:
        """End as interrupted."""
        self.end(INTERRUPTED, self._interrupted)

    def lose_peer(self) -> NoReturn:
        """End because another rank is gone."""
        time.sleep(1)  # whoever ended it, or `megasft train`, knows more: let them speak
        self.end(FAILED, f"rank {self.rank} lost another rank, which ended without a word; out of memory?")

    def end(self, code: int, message: str, details: str = "") -> NoReturn:
        """Say why, unless another has, and leave at once: peers may wait in a collective, so nothing is torn down."""
        while self._saving.is_set() and threading.current_thread() is threading.main_thread():
            time.sleep(1)  # it failed because ranks that have saved are gone; the thread that saves ends this one
        self._lock.acquire()  # for good: of two threads that come here, the second waits for the end
        try:
            # A mistake and an interruption are known to all ranks, a failure perhaps to this one alone.
            if first_to_tell(self._store, self.rank, otherwise=self.rank == "0" or code == FAILED):
                say(message, details)
            sys.stdout.flush()
            if rendezvous.is_here():
                time.sleep(2)  # so that the others hear that it has been told
        finally:  # whatever has become of the streams
            os._exit(code)

    def _heed_signals(self) -> None:
        """Python's signal handlers run when the main thread returns to Python, which one that waits in a collective may
        never do; bytes written to the wake-up descriptor reach another thread at once.
        """
        heard, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGINT, self._on_interrupt)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        # From a launcher that leaves it to rank 0 what Ctrl-C means, and blocked so far (`launch.launcher`). The main
        # thread hears of it in time: where it is sent, no rank waits for another for long.
        signal.signal(signal.SIGUSR2, self._on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _on_interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not self._lock.locked() and self._trainer is None:
            raise KeyboardInterrupt

    def _listen(self, heard: int) -> None:
        number = 0
        while not number and not self._watch.stop_asked:
            if select.select([heard], [], [], 1.0)[0]:
                number = os.read(heard, 1)[0]
                number = 0 if number == signal.SIGUSR2 else number
            elif verdict := self._watch.verdict():
                self.end(FAILED, verdict)
        if self._trainer is not None and not has_been_told(self._store):
            self._save(self._trainer)
        if number != signal.SIGINT:
            # A launcher sends it when another rank has ended, too: then the error which that causes here says more.
            time.sleep(2)
            _thread.interrupt_main()
        time.sleep(5)
        self.interrupt()

    def _save(self, trainer: Trainer) -> NoReturn:
        """Save the run and end. Every rank comes here: this one has told the others, or was told."""
        self._saving.set()
        ask_to_stop(self._store)
        if self.rank == "0" and sys.stderr.isatty():
            say("interrupted: saving the run as it was after the last step; a second Ctrl-C ends it at once")
        try:
            folder = trainer.stop()
        except (UserError, RuntimeError) as error:
            if LOST_PEER.search(str(error)):
                self.lose_peer()
            self.end(INTERRUPTED, f"{self._interrupted}; the run could not be saved ({error})")
        more = "" if trainer.config.checkpoint.resume == "auto" else " with --resume auto"
        self.end(INTERRUPTED, f"interrupted; {folder} holds the run: the same command{more} goes on from there")


def print_summary(summary: Summary, config: RunConfig) -> None:
    """What a finished run reports."""
    table = Table(title="megasft: done", show_header=False, title_justify="left")
    rows = [
        ("steps", f"{summary.steps:,}"),
        ("training loss, mean of the last 10 steps", f"{summary.train_loss:.4f}"),
        ("validation loss", "not measured" if summary.validation_loss is None else f"{summary.validation_loss:.6f}"),
        ("best validation loss", "" if summary.best_validation_loss is None else f"{summary.best_validation_loss:.6f}"),
        ("tokens", f"{summary.tokens:,} ({summary.tokens / max(summary.seconds, 1e-9):,.0f} a second over all)"),
        ("time", f"{summary.seconds:,.1f} s"),
        ("peak memory of rank 0", f"{summary.peak_memory_bytes / 2**30:.2f} GiB"),
        ("adapter", f"{config.job.output_dir}/adapter"),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, value)
    Console().print(table)
