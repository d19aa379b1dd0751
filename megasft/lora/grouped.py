"""One linear layer and one adapter per expert, with all experts of a rank in one grouped GEMM.

Weights are stacked over the experts of this rank, W [E, N, K], A [E, R, K], B [E, N, r]; rows come sorted by expert.
Expert-tensor parallelism splits the layers as in `lora.linear`, but the dispatcher does the collectives: it gathers the
tokens before the first product and reduces after the last. Unsplit factors (A of gate and up, B of down) then have
partial gradients over the expert-tensor group. megatron-core does not sum these, so they are marked
`partial_over_expert_tp` for `train.optimizer`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight, grouped_linear, grouped_lora_linear
from megasft.lora.sharded import Mode, ShardedLinear, factor
from megasft.storage.shards import Shard


class GroupedLoraLinear(ShardedLinear):
    """One projection of all experts on this rank, or several projections fused along their outputs.

    Args:
        experts: indices of this rank's experts in the full layer.
        in_features, parts, lora, writer: of one full expert; see `ShardedLinear`.
        mode: "column" or "row": how each expert is split over the expert-tensor group `group`.
        quant: keep the frozen matrices in 4 bits; None: in `dtype`.
    """

    def __init__(
        self,
        experts: Sequence[int],
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
        self.experts = list(experts)
        self.weight: Weight = self.frozen_weight(len(self.experts), dtype, quant)
        # Grouped kernels need a rank that is a multiple of 8. Rows of A and columns of B beyond r start at zero and
        # stay zero, because the gradient of each is a product with the other.
        self.padded_r = -(-lora.r // 8) * 8
        self.lora_B = nn.ParameterDict()
        if self.adapted:
            e, r = len(self.experts), self.padded_r
            self.lora_A = factor(e, r * len(self.adapted), self.in_local, dtype=dtype)
            for name in self.adapted:
                self.lora_B[name] = factor(e, self.out_local[name], r, dtype=dtype)
            for parameter, split in [
                (self.lora_A, mode == "row"),
                *((b, mode == "column") for b in self.lora_B.values()),
            ]:
                parameter.allreduce = False  # type: ignore[attr-defined]  # megatron-core: reduce over expert-data ranks
                parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
                parameter.partial_over_expert_tp = not split  # type: ignore[attr-defined]

    def forward(self, x: Tensor, offsets: Tensor, counters: Tensor | None, unread: bool = False) -> Tensor:
        """x [T, K_local] sorted by expert, offsets int32 [E] (the end of each expert's rows) -> [T, N_local].

        `counters`, int64 [T], tell the rows of all experts apart; dropout needs them. `unread`: see `lora.recompute`.
        """
        if not self.adapted:
            return grouped_linear(x, self.weight, offsets, unread)
        drop = None
        if self.drops:
            assert counters is not None
            drop = self.dropout(counters)
        B = [self.lora_B[name] for name in self.adapted]
        return grouped_lora_linear(
            x, self.weight, self.lora_A, B, self.lora_columns, self.scaling(), offsets, drop, unread
        )

    def base_shards(self) -> Iterator[Shard]:
        """The frozen matrices, one per expert and part."""
        for i, e in enumerate(self.experts):
            for name in self.parts:
                yield self.weight_shard(f"experts.{e}.{name}", name, self.weight, i)

    def adapter_shards(self) -> Iterator[Shard]:
        """The factors of each expert and adapted part."""
        r = self.lora.r
        for i, e in enumerate(self.experts):
            for j, name in enumerate(self.adapted):
                A = self.lora_A.data[i, j * self.padded_r : j * self.padded_r + r]
                yield from self.factor_shards(f"experts.{e}.{name}", name, A, self.lora_B[name].data[i, :, :r])
