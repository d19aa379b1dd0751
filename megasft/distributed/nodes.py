"""Work that one rank per node does while the others wait, without a time limit."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megasft.distributed.topology import Topology
from megasft.messages import UserError


def on_each_node[T](topology: Topology, work: Callable[[], T]) -> T:
    """Run `work()` on the first rank of each node (LOCAL_RANK 0), and return its result on every rank of the node.

    If `work` raises `UserError` on any node, all ranks raise the error of the first such rank. The ranks wait in a
    separate process group, because collectives of the other groups time out after minutes. If a rank dies, the wait of
    the others ends too.
    """
    if topology.world == 1:
        return work()
    waiting_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    result: T | None = None
    error_message: str | None = None
    try:
        if leads:
            try:
                result = work()
            except UserError as error:
                error_message = str(error)
        everyone: list[Any] = [None] * topology.world
        dist.all_gather_object(everyone, (leads, result, error_message), group=waiting_group)
    finally:
        dist.destroy_process_group(waiting_group)
    for _, _, message in everyone:
        if message is not None:
            raise UserError(message)
    leaders = [rank for rank, (leads, _, _) in enumerate(everyone) if leads]
    return everyone[max((rank for rank in leaders if rank <= topology.rank), default=leaders[0])][1]
