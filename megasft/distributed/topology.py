"""Ranks and process groups: tensor, sequence, expert, expert-tensor, pipeline and data parallel.

megatron-core's `parallel_state` creates the groups, and `Topology` passes them to the code that uses them.
"""

import contextlib
import datetime
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megasft import host
from megasft.config.parallelism import TopologySizes
from megasft.launch import rendezvous
from megasft.messages import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes and process groups: world = tensor x pipeline x data = expert_tensor x expert x pipeline x expert-data."""

    sizes: TopologySizes
    groups: ProcessGroupCollection

    @property
    def rank(self) -> int:
        """This process's rank in the world."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and so the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank. If it raises `UserError` on any rank, raise the first rank's error on all ranks.

        So bad input on one rank ends every rank with the same message, and none waits in a collective forever. The body
        must not contain collectives that a failing rank would skip.
        """
        message: str | None = None
        try:
            yield
        except UserError as error:
            message = str(error)
        messages: list[str | None] = [None] * self.world
        dist.all_gather_object(messages, message)
        first = next((found for found in messages if found is not None), None)
        if first is not None:
            raise UserError(first)

    def from_first(self, ask: Callable[[], Any] | None) -> Any:
        """The result of `ask` on rank 0, sent to every rank; its UserError too. Other ranks' `ask` is not called."""
        answer: list[Any] = [None]
        with self.together():
            if self.is_first and ask:
                answer[0] = ask()
        dist.broadcast_object_list(answer, src=0)
        return answer[0]


def join_world(sizes: TopologySizes, seed: int, timeout_minutes: float = 30.0) -> Topology:
    """Join the world and create the process groups of `sizes`.

    Ranks rendezvous at their launcher's store. Without a launcher, the process is a world of one rank. A collective
    fails after `timeout_minutes` with its backend's error.
    """
    host.prepare()
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        own: dict[str, Any] = {}
        if (store := rendezvous.connection(timeout)) is not None:
            own = {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group(host.backend(), timeout=timeout, **own)
    return regroup(sizes, seed, timeout_minutes)


def regroup(sizes: TopologySizes, seed: int, timeout_minutes: float = 30.0) -> Topology:
    """Create the process groups of `sizes` in a world already joined, replacing earlier ones."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    topology = Topology(sizes, ProcessGroupCollection.use_mpu_process_groups())
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)  # its recomputation asks for the states
    return topology


def derived_seed(seed: int, *words: object) -> int:
    """A 63-bit seed that depends only on `seed` and `words`, not on process state or Python's hash seed."""
    text = "/".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def leave_world() -> None:
    """Destroy all process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
