"""Ranks forked from their launcher, which has imported once what every rank would import: on CPUs only.

A process that has asked for CUDA cannot be forked, so on GPUs each rank is a Python of its own.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megasft.launch.parent import die_with_parent


class ForkedRank:
    """A forked process that runs `main`; of `subprocess.Popen`, what the launcher uses.

    Args:
        main: the command; it finds its place in the world in the environment.
        environment: what to change in it.
    """

    def __init__(self, main: Callable[[], None], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        signals = {signal.SIGTERM, signal.SIGUSR1}
        launcher = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may meet the launcher's handlers in a rank
        self.pid = os.fork()
        if not self.pid:
            for number in (signal.SIGINT, *signals):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            die_with_parent(launcher)
            _run(main, environment)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Return the exit code once the process has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


def _run(main: Callable[[], None], environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        os.environ.update(environment)
        if "torch" in sys.modules:  # while there is one thread: after a fork torch does not remake its pool safely
            sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
