"""One linear per expert with an adapter per expert, all experts of a rank in one grouped GEMM.

Weights are stacked over the experts of this rank, W [E, N, K], A [E, R, K], B [E, N, r]; rows come sorted by expert.
With expert-tensor parallel the layers split as in `lora.linear`, but the dispatcher owns the collectives: it gathers
the tokens before the first product and reduces after the last. Whole factors (A of gate and up, B of down) then hold
partial gradients over the expert-tensor group, which megatron-core does not sum; they carry the mark
`partial_over_expert_tp` for `train.optimizer`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight, grouped_linear, grouped_lora_linear
from megasft.lora.linear import dropout_mask, frozen
from megasft.quant.weight import QuantizedWeight
from megasft.storage.shards import Shard, Sharded, consecutive, part


class GroupedLoraLinear(Sharded):
    """The linear layers of one name, or of several fused along their outputs, of all experts on this rank.

    Args:
        experts: numbers of this rank's experts in the whole layer.
        in_features: K of a whole expert.
        parts: name to N of a whole expert, in the order in which the fused outputs stand.
        mode: "column" or "row", how an expert is split over the expert-tensor group.
        quant: keep the frozen matrices in 4 bits; None: in `dtype`.
    """

    def __init__(
        self,
        experts: Sequence[int],
        in_features: int,
        parts: Mapping[str, int],
        mode: Literal["column", "row"],
        lora: LoraSettings,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        writer: bool,
        quant: QuantSettings | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.parts = list(experts), in_features, dict(parts)
        self.mode, self.lora, self.writer = mode, lora, writer
        self.rank, self.size = group.rank(), group.size()
        in_local = in_features // self.size if mode == "row" else in_features
        out_local = {name: n // self.size if mode == "column" else n for name, n in parts.items()}
        self.columns = dict(zip(out_local, consecutive(out_local.values()), strict=True))
        self.weight: Weight
        if quant is None:
            self.weight = frozen(len(self.experts), sum(out_local.values()), in_local, dtype=dtype)
        else:
            rows = {name: (n, self._rows(n)) for name, n in parts.items()}
            self.weight = QuantizedWeight(len(self.experts), rows, in_features, self._inputs(), dtype, quant)

        self.adapted = [name for name in parts if name in lora.targets]
        self.lora_columns = [self.columns[name] for name in self.adapted]
        # Grouped kernels want the rank in multiples of 8. The rows of A and columns of B beyond r are zero, and so are
        # their gradients (each is a product with the other), so they stay zero.
        self.padded_r = -(-lora.r // 8) * 8
        self.lora_B = nn.ParameterDict()
        if self.adapted:
            e, r, device = len(self.experts), self.padded_r, host.device()
            self.lora_A = nn.Parameter(torch.zeros(e, r * len(self.adapted), in_local, dtype=dtype, device=device))
            for name in self.adapted:
                self.lora_B[name] = nn.Parameter(torch.zeros(e, out_local[name], r, dtype=dtype, device=device))
            for parameter, split in [
                (self.lora_A, mode == "row"),
                *((b, mode == "column") for b in self.lora_B.values()),
            ]:
                parameter.allreduce = False  # type: ignore[attr-defined]  # megatron-core: reduce over expert-data ranks
                parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
                parameter.partial_over_expert_tp = not split  # type: ignore[attr-defined]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K_local] sorted by expert, offsets int32 [E] (the end of each expert's rows): [T, N_local]."""
        if not self.adapted:
            return grouped_linear(x, self.weight, offsets)
        dropped = self.lora.dropout if self.training else 0.0
        mask = dropout_mask(x, dropped, "lora-expert" if self.mode == "column" else "lora-expert-sharded")
        B = [self.lora_B[name] for name in self.adapted]
        scaling = self.lora.alpha / self.lora.r / (1 - dropped)
        return grouped_lora_linear(x, self.weight, self.lora_A, B, self.lora_columns, scaling, offsets, mask)

    def base_shards(self) -> Iterator[Shard]:
        for i, e in enumerate(self.experts):
            for name, n in self.parts.items():
                at = (self._rows(n), self._inputs())
                weight = self.weight
                local = weight.data[i, self.columns[name]] if isinstance(weight, Tensor) else weight.slot(i, name)
                yield Shard(f"experts.{e}.{name}.weight", (n, self.in_features), at, local)

    def adapter_shards(self) -> Iterator[Shard]:
        r, k, first = self.lora.r, self.in_features, self.rank == 0
        for i, e in enumerate(self.experts):
            for j, name in enumerate(self.adapted):
                n = self.parts[name]
                A = self.lora_A.data[i, j * self.padded_r : j * self.padded_r + r]
                B = self.lora_B[name].data[i, :, :r]
                path = f"experts.{e}.{name}"
                first_A, first_B = first or self.mode == "row", first or self.mode == "column"
                at = (slice(0, r), self._inputs())
                yield Shard(f"{path}.lora_A.weight", (r, k), at, A, self.writer and first_A, first_A)
                at = (self._rows(n), slice(0, r))
                yield Shard(f"{path}.lora_B.weight", (n, r), at, B, self.writer and first_B, first_B)

    def _rows(self, n: int) -> slice:
        return part(n, self.rank, self.size) if self.mode == "column" else slice(0, n)

    def _inputs(self) -> slice:
        k = self.in_features
        return part(k, self.rank, self.size) if self.mode == "row" else slice(0, k)
