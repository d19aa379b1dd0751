"""One rank of a job: runs it, and ends it so that the first error is reported once and no rank hangs."""

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

from megasft import job
from megasft.board.report import write_at_end
from megasft.config.schema import RunConfig
from megasft.distributed.topology import leave_world
from megasft.launch import rendezvous
from megasft.launch.exit import (
    FAILED,
    INTERRUPTED,
    REFUSED,
    ask_to_stop,
    first_to_report,
    interrupted,
    is_done,
    tell_done,
    was_reported,
)
from megasft.launch.parent import on_parent_death
from megasft.launch.watchdog import Watchdog
from megasft.messages import UserError, say
from megasft.train.summary import print_summary
from megasft.train.trainer import Trainer

# What gloo and NCCL say when the process at the other end of a connection is gone.
LOST_PEER = re.compile("closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)


def train(config: RunConfig) -> None:
    """Train as the rank that the environment names."""

    def run(on_start: Callable[[Trainer], None]) -> None:
        summary = job.run(config, on_start)
        if dist.get_rank() == 0:
            write_at_end(config.job.output_dir)
            print_summary(summary, config)

    run_rank(run, interrupted(config), config.job.timeout_minutes)


def run_rank(run: Callable[[Callable[[Trainer], None]], None], interrupted: str, timeout_minutes: float = 10.0) -> None:
    """Run a job as one of its ranks; exits the process unless it succeeds.

    `run` is given a function that takes the trainer of a run to save, if there is one; `interrupted` is the message of
    a job without. Ranks that hang for `timeout_minutes` end the job.
    Exit codes: 0 done, 2 refused (a user's mistake), 130 interrupted, 1 failed. SIGINT, SIGTERM and SIGUSR1 to any rank
    interrupt all. Training is then saved as it was after the last step, whatever the step in progress waits for.
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
    """Ends this rank early: on signals, errors, a hang, or the launcher's death. The first rank to end says why."""

    def __init__(self, interrupted: str, timeout_minutes: float) -> None:
        self.rank, self._interrupted = os.environ["RANK"], interrupted
        self._lock = threading.Lock()
        self._trainer: Trainer | None = None
        self._stopping = False  # a signal came
        self._done = False
        self._saving = threading.Event()
        self._store = rendezvous.store()
        self._watch = Watchdog(int(self.rank), int(os.environ["WORLD_SIZE"]), 60 * timeout_minutes)
        self._handle_signals()

    def attach(self, trainer: Trainer) -> None:
        """There is a run to save from now on."""
        if self._stopping:
            self.interrupt()
        self._trainer = trainer
        if self._store is not None:  # there is a launcher; if it is killed, this rank saves the run and ends
            on_parent_death(signal.SIGTERM)
        self._watch.attach(trainer.progress.report)

    def succeed(self) -> None:
        """This rank is done; a signal from now on is too late."""
        self._done = True
        while self._saving.is_set():  # for one that came before: the thread that saves exits, or gives up
            time.sleep(0.05)
        self._watch.detach()
        tell_done(self._store)

    def interrupt(self) -> NoReturn:
        """End as interrupted."""
        self.end(INTERRUPTED, self._interrupted)

    def lose_peer(self) -> NoReturn:
        """End because another rank is gone."""
        time.sleep(1)  # the rank that failed, or the launcher, knows the reason and reports it first
        self.end(FAILED, f"rank {self.rank} lost another rank, which ended without an error message; out of memory?")

    def end(self, code: int, message: str, details: str = "") -> NoReturn:
        """Say why, unless another rank has, and exit at once; peers may wait in a collective, so tear nothing down."""
        while self._saving.is_set() and threading.current_thread() is threading.main_thread():
            time.sleep(1)  # ranks that have saved are gone, hence this error; the thread that saves exits
        self._lock.acquire()  # never released: a second thread waits here for the exit
        try:
            if self._trainer is not None:
                self._trainer.log.restore_terminal()
            # All ranks know of a mistake or an interruption; a failure perhaps this one alone.
            if first_to_report(self._store, self.rank, otherwise=self.rank == "0" or code == FAILED):
                say(message, details)
            sys.stdout.flush()
            if rendezvous.is_here():
                time.sleep(2)  # the others ask this process's store whether the reason was reported
        finally:  # even if the streams are closed
            os._exit(code)

    def _handle_signals(self) -> None:
        """Python runs signal handlers when the main thread returns to Python, which it may never do from a collective;
        bytes written to the wake-up descriptor reach another thread at once.
        """
        heard, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGINT, self._on_interrupt)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        # The launcher sends it in place of Ctrl-C where rank 0 decides what to end, and started this rank with it
        # blocked. The main thread handles it soon enough: no rank of such a job waits long for another.
        signal.signal(signal.SIGUSR2, self._on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _on_interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not self._lock.locked() and self._trainer is None and not self._done:
            raise KeyboardInterrupt

    def _listen(self, heard: int) -> None:
        number = 0
        while not number and not self._watch.stop_asked:
            if select.select([heard], [], [], 1.0)[0]:
                number = os.read(heard, 1)[0]
                number = 0 if number == signal.SIGUSR2 else number
            elif verdict := self._watch.verdict():
                self.end(FAILED, verdict)
        self._stopping = True
        if self._done:
            return
        if self._trainer is not None and not was_reported(self._store) and not self._save(self._trainer):
            return
        if number != signal.SIGINT:
            # Launchers also send SIGTERM when another rank has ended; the error that causes here says more.
            time.sleep(2)
            _thread.interrupt_main()
        time.sleep(5)
        self.interrupt()

    def _save(self, trainer: Trainer) -> bool:
        """Save the run and exit. Every rank does: this one asked the others, or was asked.

        Returns False where the job is done already, so that nothing is left to interrupt.
        """
        self._saving.set()
        if self._done:
            self._saving.clear()
            return False
        ask_to_stop(self._store)
        if self.rank == "0" and sys.stderr.isatty():
            say("interrupted: saving the run as of the last step; press Ctrl-C again to end it without")
        try:
            folder = trainer.stop()
        except (UserError, RuntimeError) as error:
            if is_done(self._store):  # a rank that has left
                self._saving.clear()
                return False
            if LOST_PEER.search(str(error)):
                self.lose_peer()
            self.end(INTERRUPTED, f"{self._interrupted}; the run could not be saved ({error})")
        more = "" if trainer.config.checkpoint.resume == "auto" else " with --resume auto"
        self.end(INTERRUPTED, f"interrupted; {folder} holds the run: run the same command{more} to resume")
