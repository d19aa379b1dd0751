"""Tensor-parallel linear layers with LoRA that issue exactly the collectives of the frozen layer.

Column parallel (q, k, v; gate, up): W and B are split over the outputs, A is replicated.

    y_i = x W_i^T + s (x A^T) B_i^T

Both branches use the same all-gather of x. Backward adds their gradients of x before the one reduce-scatter. Each rank
has a partial gradient of A.

Row parallel (o; down): W and A are split over the inputs, B is replicated.

    y = reduce_scatter(x_i W_i^T + s (x_i A_i^T) B^T)

The frozen branch's reduce-scatter also sums the partial LoRA outputs. Each rank has a partial gradient of B.

The partial gradients are summed over TP once per step, not once per micro batch: the factors are marked
`sequence_parallel`, as layer norm weights are, and megatron-core's `finalize_model_grads` sums marked gradients.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight, frozen_linear, lora_linear
from megasft.lora.recompute import Unread
from megasft.lora.sharded import Mode, ShardedLinear, factor
from megasft.storage.shards import Shard, leaf


class LoraLinear(ShardedLinear):
    """One frozen matrix, or several fused along their outputs. Each has its own adapter if it is a target.

    Args:
        in_features, parts, mode, lora, group, writer: see `ShardedLinear`. Use `mode` "replicated" if the input is a
            sequence shard, as the router's is.
        group: the tensor-parallel group.
        dtype: dtype of all parameters.
        quant: keep the frozen matrices in 4 bits; None: in `dtype`.

    Parameters: weight [N_local, K_local] (or a QuantizedWeight), lora_A [r * adapted parts, K_local], lora_B.<part>
    [N_local, r].
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        mode: Mode,
        lora: LoraSettings,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        writer: bool,
        quant: QuantSettings | None = None,
    ) -> None:
        super().__init__(in_features, parts, mode, lora, group, writer)
        self.weight: Weight = self.frozen_weight(None, dtype, quant)
        self.lora_B = nn.ParameterDict()
        if self.adapted:
            self.lora_A = factor(lora.r * len(self.adapted), self.in_local, dtype=dtype)
            for name in self.adapted:
                self.lora_B[leaf(name)] = factor(self.out_local[name], lora.r, dtype=dtype)
            for parameter, split in [
                (self.lora_A, mode == "row"),
                *((b, mode == "column") for b in self.lora_B.values()),
            ]:
                # Gradient norms count `tensor_model_parallel` parameters on every rank, and others only once.
                parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
                parameter.sequence_parallel = not split  # type: ignore[attr-defined]

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        """Column: a sequence shard x [S, 1, K] -> [S * TP, 1, N / TP]. Row: x [S * TP, 1, K / TP] -> [S, 1, N].

        `unread`: the values of the output are not wanted (see `lora.recompute`).
        """
        if self.mode == "column" and self.size > 1:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        y = self.multiply(x.flatten(0, -2), self.weight, unread).view(*x.shape[:-1], -1)
        if self.mode == "row" and self.size > 1:
            y = scattered(y, self.group, unread)
        return y

    def multiply(self, x: Tensor, weight: Weight, unread: bool = False) -> Tensor:
        """The sum of the frozen and the LoRA branch, in the dtype of x: x [T, K_local] -> [T, N_local]."""
        if not self.adapted:
            return frozen_linear(x, weight, unread)
        drop = None
        if self.drops:
            assert self.draw is not None
            drop = self.dropout(self.draw.shard(self.group) if self.mode == "replicated" else self.draw.places)
        A, B = self.lora_A.to(x.dtype), [self.lora_B[leaf(name)].to(x.dtype) for name in self.adapted]
        return lora_linear(x, weight, A, B, self.lora_columns, self.scaling(), drop, unread)

    def base_shards(self) -> Iterator[Shard]:
        """The frozen matrices, one per part."""
        for name in self.parts:
            yield self.weight_shard(name, name, self.weight, None)

    def adapter_shards(self) -> Iterator[Shard]:
        """The LoRA factors of each adapted part."""
        r = self.lora.r
        for i, name in enumerate(self.adapted):
            A, B = self.lora_A.data[i * r : (i + 1) * r], self.lora_B[leaf(name)].data
            yield from self.factor_shards(name, name, A, B)


def scattered(y: Tensor, group: dist.ProcessGroup, unread: bool) -> Tensor:
    """The sum of y [S * TP, ...] over the ranks of `group`, of which each takes its [S, ...]; no values if `unread`."""
    if unread:
        shape = (len(y) // group.size(), *y.shape[1:])
        return Unread.apply(y, shape, partial(gather_from_sequence_parallel_region, group=group))
    return reduce_scatter_to_sequence_parallel_region(y, group=group)
