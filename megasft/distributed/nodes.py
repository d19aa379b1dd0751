"""Work that one rank of each node does while the others wait, however long it takes."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megasft.distributed.topology import Topology
from megasft.messages import UserError


def on_each_node[T](topology: Topology, work: Callable[[], T]) -> T:
    """`work()`, done on the first rank of each node (LOCAL_RANK 0); what it gave there, on every rank of the node.

    If it raised `UserError` on any, all ranks raise the first such rank's. The ranks wait in a group of their own: the
    other groups give up after minutes, and a rank that dies ends the wait of the others in this one too.
    """
    if topology.world == 1:
        return work()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    result: T | None = None
    refusal: str | None = None
    try:
        if leads:
            try:
                result = work()
            except UserError as error:
                refusal = str(error)
        everyone: list[Any] = [None] * topology.world
        dist.all_gather_object(everyone, (leads, result, refusal), group=patient)
    finally:
        dist.destroy_process_group(patient)
    for _, _, words in everyone:
        if words is not None:
            raise UserError(words)
    leaders = [rank for rank, (leads, _, _) in enumerate(everyone) if leads]
    return everyone[max((rank for rank in leaders if rank <= topology.rank), default=leaders[0])][1]
