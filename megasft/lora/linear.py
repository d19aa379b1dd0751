"""Tensor-parallel linear layers with LoRA that issue exactly the collectives of the frozen layer.

Column parallel (q, k, v; gate, up): W and B are split over the outputs, A is whole on every rank.

    y_i = x W_i^T + s (x A^T) B_i^T

The all-gather of x serves both branches; in backward their shares of dx are added before the one reduce-scatter. Each
rank has only its part of A's gradient.

Row parallel (o; down): W and A are split over the inputs, B is whole on every rank.

    y = reduce_scatter(x_i W_i^T + s (x_i A_i^T) B^T)

The partial LoRA output rides in the frozen branch's reduction. Each rank has only its part of B's gradient.

The partial gradients are summed over TP once a step, not once a micro batch: they are marked `sequence_parallel`, as
layer norm weights are, and megatron-core's `finalize_model_grads` adds up what carries that mark.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight, frozen_linear, lora_linear
from megasft.lora.sharded import Mode, ShardedLinear, factor
from megasft.storage.shards import Shard, leaf


class LoraLinear(ShardedLinear):
    """One frozen matrix, or several fused along their outputs, each with an adapter of its own if it is a target.

    Args:
        in_features, parts, mode, lora, group, writer: see `ShardedLinear`; `mode` "replicated" is for an input that is
            a sequence shard, as the router's.
        group: the tensor-parallel group.
        dtype: of all parameters.
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
                # `tensor_model_parallel` says that each rank has its own part, which counts in the gradient norm.
                parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
                parameter.sequence_parallel = not split  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [S, 1, K]: column takes the sequence shard and gives [S * TP, 1, N / TP]; row the reverse."""
        if self.mode == "column" and self.size > 1:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        y = self.multiply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
        if self.mode == "row" and self.size > 1:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.group)
        return y

    def multiply(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, K_local] through the frozen and the low-rank branch, in the dtype of x: [T, N_local]."""
        if not self.adapted:
            return frozen_linear(x, weight)
        dropped, scaling = self.scaling()
        # In column mode all ranks hold the same x and must drop the same elements; otherwise each has its own part.
        mask = dropout_mask(x, dropped, "lora" if self.mode == "column" else "lora-sharded")
        A, B = self.lora_A.to(x.dtype), [self.lora_B[leaf(name)].to(x.dtype) for name in self.adapted]
        return lora_linear(x, weight, A, B, self.lora_columns, scaling, mask)

    def base_shards(self) -> Iterator[Shard]:
        """The frozen matrices, one for each part."""
        for name in self.parts:
            yield self.weight_shard(name, name, self.weight, None)

    def adapter_shards(self) -> Iterator[Shard]:
        """The factors of each adapted part."""
        r = self.lora.r
        for i, name in enumerate(self.adapted):
            A, B = self.lora_A.data[i * r : (i + 1) * r], self.lora_B[leaf(name)].data
            yield from self.factor_shards(name, name, A, B)


def dropout_mask(x: Tensor, p: float, random_state: str) -> Tensor | None:
    """Which elements of x an adapter sees, drawn from a state of megatron-core's tracker; None if it sees all."""
    if p == 0.0:
        return None
    with get_cuda_rng_tracker().fork(random_state):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
