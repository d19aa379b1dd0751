"""Run commands that are expected to fail, and collect their output and exit codes."""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megasft.launch import rendezvous
from tests.support.world import make_world


@dataclass(frozen=True)
class Ended:
    """Exit codes in rank order, and everything written to standard error and output."""

    codes: list[int | None]
    said: str
    printed: str


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A folder with a valid job for two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("pristine")
    make_world(folder, tensor=2, data=1)
    return folder


@pytest.fixture
def world(pristine, tmp_path) -> Path:
    """A copy of the job for a test to spoil: model/, train.jsonl, validation.jsonl, job.toml; its output goes to run/."""
    folder = shutil.copytree(pristine, tmp_path / "world")
    run_file = folder / "job.toml"
    run_file.write_text(run_file.read_text().replace(str(pristine), str(folder)))
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """One thread a rank, a cache of their own, and bytecode kept: that of the packages is what `make install` compiled."""
    changed = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    return os.environ | changed | {"PYTHONDONTWRITEBYTECODE": ""}


@pytest.fixture
def megasft(tmp_path) -> Callable[..., Ended]:
    """`megasft(*arguments, ranks=0, only=None, typed="", met=False)`: the command as a process that has imported everything.

    `typed` is its standard input; `met`: another job's ranks have met at the port. With `ranks` it runs as so many ranks of torchrun's, or as the one rank `only` of them; without, it must refuse before
    it launches any.
    """

    def run(*arguments: str, ranks: int = 0, only: int | None = None, typed: str = "", met: bool = False) -> Ended:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if met:
            rendezvous.claim(store, "another", 1)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
        for stream, text in zip(streams, (typed, "", ""), strict=True):
            stream.write_text(text)
        processes = []
        for rank in range(ranks or 1) if only is None else [only]:
            world = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", rendezvous.LAUNCH: "this one",
            }  # fmt: skip
            processes.append(context.Process(target=_main, args=(arguments, world if ranks else {}, streams)))
            processes[-1].start()
        wait([process.sentinel for process in processes], 90)
        deadline = time.monotonic() + 20
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()  # if it hangs
            process.join()
        return Ended(
            [process.exitcode for process in processes],
            *(stream.read_bytes().decode() for stream in (streams[2], streams[1])),
        )

    return run


def _main(arguments: tuple[str, ...], environment: dict[str, str], streams: list[Path]) -> None:
    os.environ.update(environment, XDG_CACHE_HOME=str(streams[0].parent))
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = os.fdopen(0)
    import torch

    torch.set_num_threads(1)  # while there is one thread: torch makes its pool anew after a fork, and not safely
    sys.argv = ["megasft", *arguments]
    if any("tags.fault" in argument for argument in arguments):
        import tests.support.misbehave  # noqa: F401
    from megasft import cli
    from megasft.launch import launcher

    launcher.launch = lambda *_, **__: sys.exit("nothing was refused before the launch")
    cli.main()
