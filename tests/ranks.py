"""One pool of rank processes for the whole test session: starting Python, torch and megatron-core costs seconds each."""

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

WORLD = 4
TIMEOUT = 300.0


class RankPool:
    """`pool(n, function, *args)` runs `function(*args)` on n ranks and returns the n results in order of rank.

    The function must be at a module's top level. An exception on any rank is raised here, with its traceback.
    """

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        # The fork server imports once what all workers need; `spawn` would import it in each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.on_ranks"])
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            worker.start()
            self._workers.append(worker)
            self._pipes.append(ours)

    def __call__(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        if not self._workers:
            self._start()
        call = (ranks, _free_port(), function.__module__, function.__qualname__, args)
        for pipe in self._pipes[:ranks]:
            pipe.send(call)
        answers: dict[int, Any] = {}
        pending = dict(zip(self._pipes[:ranks], range(ranks), strict=True))
        while pending:
            ready = wait(list(pending), timeout=TIMEOUT)
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer in {TIMEOUT:.0f} s")
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = ("error", "the process died")
                if answers[rank][0] == "error":
                    self.stop()  # its peers wait in a collective
                    raise AssertionError(f"rank {rank} of {ranks}:\n{answers[rank][1]}")
        return [answers[rank][1] for rank in range(ranks)]

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []


def _serve(rank: int, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1")
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megasft import host

    host.prepare()
    while True:
        try:
            ranks, port, module, name, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
            function = getattr(importlib.import_module(module), name)
            answer = ("result", function(*args))
            from megasft import topology

            topology.stop()
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
