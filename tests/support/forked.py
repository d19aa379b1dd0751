"""`megasft train` as it is, launcher and ranks, but forked from a server that has imported everything already."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

MAX_SECONDS = 120.0  # of a command that hangs
LEFT_SECONDS = 10.0  # for all processes to end once the launcher or a rank has ended
LAUNCHER = -1


class Command:
    """`megasft *arguments` in a session of its own, begun at once; standard error is appended to the file `errors`.

    Args:
        in_rank: called in each rank before it runs, with `args`; must be at a module's top level.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        errors: Path,
        in_rank: Callable[..., None] | None = None,
        args: tuple = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        self.errors = errors
        self._before = errors.stat().st_size if errors.exists() else 0
        begun, begins = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_launcher, args=(list(arguments), str(errors), in_rank, args, begins), daemon=True
        )
        self._process.start()
        self.pid: int = begun.recv()
        self._started = time.monotonic()

    def kill(self, who: int | None = None) -> None:
        """SIGKILL a rank, the LAUNCHER, or all together."""
        with contextlib.suppress(ProcessLookupError, IndexError):
            if who is None:
                self.kill_all()
            else:
                os.kill(self.pid if who == LAUNCHER else self.ranks()[who], signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL launcher and ranks together."""
        os.killpg(self.pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """The processes of the ranks that have not ended."""
        return sorted(set(self.alive()) - {self.pid})

    def alive(self) -> list[int]:
        """The processes of the command that have not ended."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def wait(self) -> int | None:
        """The exit code, when launcher and ranks have ended."""
        most, last = 0, time.monotonic()  # the processes that it had, and when it last had as many
        try:
            while alive := self.alive():
                now = time.monotonic()
                most, last = (len(alive), now) if len(alive) >= most else (most, last)
                if now - self._started > MAX_SECONDS:
                    raise TimeoutError(f"still running after {MAX_SECONDS:.0f} s; it said: {self.said()}")
                if now - last > LEFT_SECONDS:
                    raise TimeoutError(f"{alive} of {self.pid} outlive the others; it said: {self.said()}")
                time.sleep(0.02)
        finally:
            self.kill()
        return self.exit_code()

    def exit_code(self) -> int | None:
        """Of the launcher, which has ended."""
        self._process.join()
        return self._process.exitcode

    def said(self) -> str:
        """What it has written to standard error."""
        return self.errors.read_bytes()[self._before :].decode(errors="replace") if self.errors.exists() else ""


def _launcher(
    arguments: list[str],
    errors: str,
    in_rank: Callable[..., None] | None,
    args: tuple,
    begins: Connection,
) -> None:
    os.setsid()
    begins.send(os.getpid())
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = sys.orig_argv = ["megasft", *arguments]
    from megasft import cli
    from megasft.launch import forked_rank, launcher

    if in_rank:
        run = forked_rank._run
        forked_rank._run = lambda main, environment: run(lambda: (in_rank(*args), main()), environment)  # type: ignore[assignment,func-returns-value]
    launcher.STOP_SECONDS = 1.0  # tests/faults/test_ends.py sees to it that ranks end by themselves
    _exit_as(cli.main)


def _exit_as(main: Callable[[], None]) -> None:
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stderr.flush()
    os._exit(code)
