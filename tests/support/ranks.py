"""Rank processes for tests, forked from one server that has imported torch, megatron-core and megasft already.

Importing those costs seconds a process. A fork costs a tenth, and ends with the test: process groups of gloo keep threads
that would pile up in a process that is used again. On GPUs each rank is a Python of its own: a process that has asked for
CUDA cannot be forked.
"""

import importlib
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 300.0


class RankPool:
    """`pool(n, function, *args)` runs `function(*args)` on n ranks and returns the n results in order of rank.

    The function must be at a module's top level. An exception on any rank is raised here, with its traceback. Tensors in
    a result come back on the CPU.

    Args:
        device: "cpu", or "cuda" for one GPU a rank: model and collectives are there then, in NCCL.
        timeout: seconds without an answer from any rank.
    """

    def __init__(self, device: str = "cpu", timeout: float = TIMEOUT) -> None:
        self.device, self._timeout = device, timeout
        self._context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            self._context.set_forkserver_preload(["tests.support.preload"])

    def __call__(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        port = _free_port()
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = self._context.Pipe(duplex=False)
            call = (self.device, rank, ranks, port, function.__module__, function.__qualname__, args, theirs)
            processes.append(self._context.Process(target=_work, args=call, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return self._collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _collect(self, pipes: list[Connection]) -> list[Any]:
        answers: dict[int, Any] = {}
        pending = {pipe: rank for rank, pipe in enumerate(pipes)}
        while pending:
            ready = wait(list(pending), timeout=self._timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer in {self._timeout:.0f} s")
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    kind, answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    kind, answers[rank] = "error", "the process died"
                if kind == "error":
                    raise AssertionError(f"rank {rank} of {len(pipes)}:\n{answers[rank]}")
        return [answers[rank] for rank in range(len(pipes))]


def _work(device: str, rank: int, ranks: int, port: int, module: str, name: str, args: tuple, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.utils._pytree import tree_map_only

    torch.set_num_threads(1)  # while there is one thread: torch makes its pool anew after a fork, and not safely
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    try:
        from megasft import host

        host.import_megatron()
        host.prepare()
        assert host.device().type == device, f"torch puts the model on {host.device()}, not on {device}"
        dist.init_process_group(host.backend(), init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        result = getattr(importlib.import_module(module), name)(*args)
        answer = ("result", tree_map_only(torch.Tensor, torch.Tensor.cpu, result))
        dist.barrier()  # rank 0 holds the store: nobody leaves before all are done
    except BaseException:
        answer = ("error", traceback.format_exc())
    # By value: torch's own way of passing tensors between processes needs the sender to live on.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
