"""Forward and backward of a global batch, and its sums over all ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.data.micro_batches import MicroBatches
from megasft.distributed.topology import Topology
from megasft.model.batch import MicroBatch
from megasft.train.expert_load import ExpertLoad


class Totals(NamedTuple):
    """Of a global batch: mean loss, supervised tokens, and the share of them that is predicted right."""

    loss: float
    tokens: int
    accuracy: float


class ForwardBackward:
    """Called with the micro batches of this rank; every rank calls it.

    Args:
        length: the longest sequence.
        on_micro_batch: is given each micro batch before its forward.
    """

    def __init__(
        self,
        topology: Topology,
        ddp: DistributedDataParallel,
        load: ExpertLoad,
        length: int,
        on_micro_batch: Callable[[MicroBatch], None],
    ) -> None:
        self._counts = topology.groups.tp.rank() == 0  # every rank of a tensor-parallel group holds the same sums
        self._ddp, self._load, self._length, self._on_micro_batch = ddp, load, length, on_micro_batch
        self._device = host.device()

    def __call__(self, batches: MicroBatches | list[MicroBatch], training: bool) -> Totals:
        """Forward, and backward if training; `load` has the counts of the experts afterwards."""
        self._ddp.train(training)
        self._load.start(batches, training)
        outcomes = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(batches),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=self._length,
            micro_batch_size=1,
            forward_only=not training,
        )
        total = torch.zeros(3, dtype=torch.float64, device=self._device)
        if outcomes and self._counts:  # of the last stage
            total += torch.stack(outcomes).sum(0)
        total = torch.cat([total, self._load.counted()])
        dist.all_reduce(total)
        total = total.cpu()
        self._load.settle(total[3:])
        loss_sum, tokens, correct = total[:3].tolist()
        return Totals(loss_sum / max(1.0, tokens), int(tokens), correct / max(1.0, tokens))

    def _forward(self, batches: Any, ddp: Any) -> tuple[Tensor, Any]:
        """megatron-core's forward step: the output, and what makes of it the loss, its tokens and the report."""
        batch: MicroBatch = next(batches)
        self._on_micro_batch(batch)
        return ddp(batch), partial(_loss, batch)


def _loss(batch: MicroBatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    loss_sum, correct = output
    tokens = (batch.labels >= 0).sum()
    return loss_sum, tokens.int(), torch.stack([loss_sum.detach().double(), tokens.double(), correct.double()])
