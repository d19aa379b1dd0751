"""`megasft` and torchrun as they are, launcher and ranks, but forked from a server that has imported everything already."""

import contextlib
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from megasft.launch import forked_rank

MAX_SECONDS = 120.0  # of a command that hangs
LEFT_SECONDS = 10.0  # for all processes to end once the launcher or a rank has ended
LAUNCHER = -1


def _megasft(arguments: list[str]) -> None:
    sys.argv = sys.orig_argv = ["megasft", *arguments]
    from megasft import cli
    from megasft.launch import launcher

    launcher.STOP_SECONDS = 1.0  # tests/faults/test_ends.py sees to it that ranks end by themselves
    cli.main()


class Command:
    """`megasft *arguments` in a session of its own, begun at once; standard error is appended to the file `errors`.

    Args:
        in_rank: called in each rank before it runs, with `args`; must be at a module's top level.
        folder: where it runs, if not here.
    """

    _run: Callable[[list[str]], None] = staticmethod(_megasft)
    _name = ""

    def __init__(
        self,
        arguments: Sequence[str],
        errors: Path,
        in_rank: Callable[..., None] | None = None,
        args: tuple = (),
        folder: Path | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        self.errors = errors
        self._before = errors.stat().st_size if errors.exists() else 0
        begun, begins = context.Pipe(duplex=False)
        call = (self._run, list(arguments), self._name, str(errors), in_rank, args, folder, begins)
        self._process = context.Process(target=_launcher, args=call, daemon=True)
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


class Torchrun(Command):
    """`torchrun *arguments`, its standard output in the file `printed`. Its agent is torch's, with ranks forked from it.

    A rank has what torchrun gives it: a session of its own, its environment, arguments, signals and standard streams.
    """

    def __init__(self, arguments: Sequence[str], errors: Path, printed: Path | None = None) -> None:
        self._name = uuid.uuid4().hex[:15]  # of launcher and ranks, and of no other process
        super().__init__([str(printed or os.devnull), *arguments], errors)

    @staticmethod
    def _run(arguments: list[str]) -> None:
        printed, *sys.argv[1:] = arguments
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

        SubprocessHandler._popen = lambda _, command, environment: _ForkedProgram(command, environment)  # type: ignore[method-assign]
        run.main(sys.argv[1:])

    def alive(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                beginning, _, rest = path.read_text().rpartition(")")
                if beginning.partition("(")[2] == self._name and rest.split()[0] != "Z":
                    found.append(int(path.parent.name))
        return found

    def kill_all(self) -> None:
        while alive := self.alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class _ForkedProgram(forked_rank.ForkedRank):
    """What torchrun would start as `python -u FILE ...` or `python -u -m MODULE ...`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        assert command[:2] == (sys.executable, "-u")

        def main() -> None:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if command[2] == "-m":
                sys.argv = ["-m", *command[4:]]
                runpy.run_module(command[3], run_name="__main__", alter_sys=True)
            else:
                sys.argv = list(command[2:])
                runpy.run_path(command[2], run_name="__main__")

        super().__init__(main, environment)

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        return code


def _launcher(
    run: Callable[[list[str]], None],
    arguments: list[str],
    name: str,
    errors: str,
    in_rank: Callable[..., None] | None,
    args: tuple,
    folder: Path | None,
    begins: Connection,
) -> None:
    os.setsid()
    if name:
        Path("/proc/self/comm").write_text(name)
    begins.send(os.getpid())
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if folder:
        os.chdir(folder)
    if in_rank:
        rank = forked_rank._run
        forked_rank._run = lambda main, environment: rank(lambda: (in_rank(*args), main()), environment)  # type: ignore[assignment,func-returns-value]
    exit_as(lambda: run(arguments))


def exit_as(main: Callable[[], None]) -> None:
    """Run a program's function and end this process as the program would."""
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
