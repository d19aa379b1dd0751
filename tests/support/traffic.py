"""Which collective an operator of torch.distributed is, over which group, and the bytes of it."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

GROUPS = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tp x ep",
    "EXPERT_DATA_PARALLEL_GROUP": "expert dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "norm",
}
# An unknown collective or group is a KeyError: the test must learn of it.
KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


def collective(func: Any, args: tuple) -> tuple[tuple[str, str], int] | None:
    """((group, kind), bytes) of a collective among several ranks; None for any other operator.

    Bytes are those of the larger side; of an all-to-all, those that this rank sends.
    """
    if func.namespace != "c10d":
        return None
    kind = KINDS[func._schema.name.removeprefix("c10d::")]
    sides, group = [], None
    for value, spec in zip(args, func._schema.arguments, strict=False):
        if "ProcessGroup" in str(spec.type):
            group = dist.ProcessGroup.unbox(value)
        elif "Tensor" in str(spec.type) and value is not None:
            sides.append(sum(tensor.numel() * tensor.element_size() for tensor in _flat(value)))
    assert group is not None
    if group.size() == 1:
        return None
    return (GROUPS[group.group_desc], kind), sides[1] if kind == "all-to-all" else max(sides)


def _flat(value: Any) -> list:
    return [tensor for one in value for tensor in _flat(one)] if isinstance(value, list | tuple) else [value]


class Traffic(TorchDispatchMode):
    """Calls and bytes of collectives by (group, kind), counted as `StepTraffic` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if found := collective(func, args):
            key, size = found
            self.calls[key] += 1
            self.bytes[key] += size
        return func(*args, **(kwargs or {}))
