"""Where a linear layer, or several fused along their outputs, lie on a rank, and which of them are adapted."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight
from megasft.quant.weight import QuantizedWeight, Slot
from megasft.storage.shards import Shard, Sharded, consecutive, leaf, part

Mode = Literal["column", "row", "replicated"]


class ShardedLinear(Sharded):
    """What `LoraLinear` and `GroupedLoraLinear` have in common.

    Args:
        in_features: K of the whole layer.
        parts: name to N of the whole layer, in the order in which the fused outputs stand on every rank.
        mode: "column" splits the outputs over `group`, "row" the inputs, "replicated" nothing.
        lora: r, alpha, dropout and targets; a part is adapted if its last name is a target.
        writer: whether this rank is the one of its data-parallel replicas that writes adapters.

    Attributes:
        in_local, out_local: K, and name to N, of what this rank holds.
        columns: name to the output columns of a part on this rank; `lora_columns` those of the adapted parts.
        adapted: names of the adapted parts.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        mode: Mode,
        lora: LoraSettings,
        group: dist.ProcessGroup,
        writer: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.parts = in_features, dict(parts)
        self.mode, self.lora, self.group, self.writer = mode, lora, group, writer
        self.rank, self.size = group.rank(), group.size()
        self.in_local = in_features // self.size if mode == "row" else in_features
        self.out_local = {name: n // self.size if mode == "column" else n for name, n in parts.items()}
        self.columns = dict(zip(self.out_local, consecutive(self.out_local.values()), strict=True))
        self.adapted = [name for name in parts if leaf(name) in lora.targets]
        self.lora_columns = [self.columns[name] for name in self.adapted]

    def scaling(self) -> tuple[float, float]:
        """(probability of dropping an input of the adapters, factor of their output)."""
        dropped = self.lora.dropout if self.training else 0.0
        return dropped, self.lora.alpha / self.lora.r / (1 - dropped)

    def frozen_weight(self, experts: int | None, dtype: torch.dtype, quant: QuantSettings | None) -> Weight:
        """Storage for the frozen matrices, [N_local, K_local] or stacked over `experts`; with `quant` in 4 bits."""
        if quant is None:
            stack = () if experts is None else (experts,)
            return frozen(*stack, sum(self.out_local.values()), self.in_local, dtype=dtype)
        rows = {name: (n, self.rows(n)) for name, n in self.parts.items()}
        return QuantizedWeight(experts or 1, rows, self.in_features, self.inputs(), dtype, quant)

    def rows(self, n: int) -> slice:
        """This rank's outputs of `n`."""
        return part(n, self.rank, self.size) if self.mode == "column" else slice(0, n)

    def inputs(self) -> slice:
        """This rank's inputs."""
        return part(self.in_features, self.rank, self.size) if self.mode == "row" else slice(0, self.in_features)

    def weight_shard(self, path: str, name: str, weight: Weight, expert: int | None) -> Shard:
        """The frozen matrix `path` of a part; `expert` counts in the stack, if there is one."""
        local: Tensor | Slot
        if isinstance(weight, Tensor):
            local = (weight.data if expert is None else weight.data[expert])[self.columns[name]]
        else:
            local = weight.slot(expert or 0, name)
        n = self.parts[name]
        return Shard(f"{path}.weight", (n, self.in_features), (self.rows(n), self.inputs()), local)

    def factor_shards(self, path: str, name: str, A: Tensor, B: Tensor) -> Iterator[Shard]:
        """The factors A [r, K_local] and B [N_local, r] of a part; the first rank writes one that is not split."""
        n, r = self.parts[name], self.lora.r
        first_A, first_B = self.rank == 0 or self.mode == "row", self.rank == 0 or self.mode == "column"
        at_A, at_B = (slice(0, r), self.inputs()), (self.rows(n), slice(0, r))
        yield Shard(f"{path}.lora_A.weight", (r, self.in_features), at_A, A, self.writer and first_A, first_A)
        yield Shard(f"{path}.lora_B.weight", (n, r), at_B, B, self.writer and first_B, first_B)


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Storage for a weight that is read from a checkpoint and never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=host.device()), requires_grad=False)


def factor(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Storage for a LoRA factor, zero."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=host.device()))
