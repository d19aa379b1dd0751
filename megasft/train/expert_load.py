"""Tokens per expert: counted, reported, and balanced by an optional loss.

With C_e the tokens sent to expert e and Q_e its router probability (softmax over all experts), both summed over all
tokens of the global batch and all sparse layers, R tokens x sparse layers, and E experts, the loss is

    E * sum_e C_e / R * Q_e / R

which is transformers' `load_balancing_loss_func` of a forward of the whole global batch (Fedus et al. 2021,
arXiv:2101.03961, equations 4 to 6). Taken over the global batch it depends neither on the topology nor on how the
batch is cut into micro batches, and asks no small batch to be balanced in itself (Qiu et al. 2025, arXiv:2501.11873,
"global-batch"). C_e has no gradient, and must be known whole before the first backward. So a step begins with a
forward of its batch that only counts; then the loss is sum_e w_e Q_e with w_e = E C_e / R^2 constant, which every
router adds for its own tokens.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.data.micro_batches import MicroBatches
from megasft.model.batch import MicroBatch
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.model.shape import sparse_layers


class ExpertLoad:
    """The load of every expert over one global batch.

    Call `start`, sum `counted` over all ranks (together with whatever else is summed), and pass the sum to `settle`.
    Then `tokens` int64 [sparse layers, experts] holds the total counts, on the host.

    Args:
        coefficient: of the load-balancing loss; 0: none, and no forward to count.
    """

    def __init__(self, model: Qwen3Moe, coefficient: float = 0.0) -> None:
        self.model, self.coefficient = model, coefficient
        self.experts, self.top_k = model.hf_config.num_experts, model.hf_config.num_experts_per_tok
        layers = [layer for layer, sparse in enumerate(sparse_layers(model.hf_config)) if sparse]
        self._rows = {layers.index(layer): router for layer, router in model.routers()}
        self.tokens = torch.zeros(len(layers), self.experts, dtype=torch.int64)
        self.capacity = model.config.moe_expert_capacity_factor is not None
        self.balance_loss = 0.0
        self.dropped = 0  # of all choices of an expert, those that its capacity dropped

    def start(self, batches: MicroBatches | list[MicroBatch], training: bool) -> None:
        """Reset the counts; when training with a balancing loss, compute the experts' weights in it (a forward)."""
        self._clear(None)
        if training and self.coefficient and len(self.tokens):
            self._clear(self._weights(batches))

    def counted(self) -> Tensor:
        """This rank's share of all counts and of Q, flat, fp64: exact up to 2^53 tokens."""
        counts = torch.zeros(self.tokens.shape, dtype=torch.float64, device=host.device())
        sums = torch.zeros(self.experts + 1, dtype=torch.float64, device=host.device())
        for row, router in self._rows.items():
            counts[row] = router.tokens_per_expert
            sums[:-1].add_(router.probability_sums)
            sums[-1].add_(router.dropped)
        return torch.cat([counts.flatten(), sums])

    def settle(self, total: Tensor) -> None:
        """Take the sum of `counted` over all ranks, on the host."""
        counts, sums, dropped = total.split([self.tokens.numel(), self.experts, 1])
        self.dropped = int(dropped)
        self.tokens = counts.view_as(self.tokens).long()
        share, rows = counts.view_as(self.tokens).sum(0), counts.sum().item() / self.top_k
        self.balance_loss = float(self.experts * (share @ sums)) / max(1.0, rows) ** 2

    def report(self) -> dict[str, float | None]:
        """For a line of metrics: the busiest expert's tokens over the mean of all, averaged over layers and at worst.

        1 is even, experts / top-k the maximum. With a capacity also the share of choices it dropped, with a balancing
        loss its value before the coefficient.
        """
        if not self.tokens.numel():
            return {}
        imbalance = imbalances(self.tokens)
        values: dict[str, float | None] = {
            "expert_imbalance": float(imbalance.mean()),
            "expert_imbalance_worst": float(imbalance.max()),
        }
        if self.capacity:
            values["dropped"] = self.dropped / max(1, int(self.tokens.sum()))
        if self.coefficient:
            values["balance_loss"] = self.balance_loss if math.isfinite(self.balance_loss) else None
        return values

    def _clear(self, weights: Tensor | None) -> None:
        for router in self._rows.values():
            router.tokens_per_expert.zero_()
            router.probability_sums.zero_()
            router.dropped.zero_()
            router.balance_weights = weights

    def _weights(self, batches: MicroBatches | list[MicroBatch]) -> Tensor:
        """coefficient * w_e, times the supervised tokens by which all gradients are divided at the end: fp32 [E]."""
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=_route,
                data_iterator=iter(batches),
                model=[self.model],
                num_microbatches=len(batches),
                seq_length=self.model.max_sequence_length,  # of no effect: shapes vary
                micro_batch_size=1,
                forward_only=True,
            )
        groups, here = self.model.topology.groups, self.counted()
        counts_labels = groups.tp.rank() == 0 and groups.pp.rank() == 0  # of the ranks that have the same micro batches
        supervised = sum(int((batch.labels >= 0).sum()) for batch in batches) if counts_labels else 0
        total = torch.cat([here, here.new_tensor([supervised])])
        dist.all_reduce(total)
        share = total[: self.tokens.numel()].view_as(self.tokens).sum(0)
        rows = (share.sum() / self.top_k).clamp_min(1)
        return (self.coefficient * self.experts * total[-1] * share / rows**2).float()


def imbalances(tokens: Tensor) -> Tensor:
    """Most tokens of an expert over the mean of all, for each layer: tokens [layers, experts] to fp64 [layers]."""
    tokens = tokens.double()
    return tokens.amax(-1) / tokens.mean(-1).clamp_min(1e-12)


def _route(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    batch = next(batches)
    return model.route(batch), partial(_no_loss, batch)


def _no_loss(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output, torch.zeros((), dtype=torch.int32, device=output.device), output
