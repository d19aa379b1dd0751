"""How linear layers, single or fused along their outputs, are sharded over ranks, and which of them are adapted."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.dropout import SHARES, Draw, Dropout, key, share
from megasft.lora.functional import Weight
from megasft.quant.weight import QuantizedWeight, Slot
from megasft.storage.shards import Shard, Sharded, consecutive, leaf, part

Mode = Literal["column", "row", "replicated"]


class ShardedLinear(Sharded):
    """The common base of `LoraLinear` and `GroupedLoraLinear`.

    Args:
        in_features: K of the full layer.
        parts: by name, N of each full layer, in the order of the fused outputs on every rank.
        mode: "column" splits the outputs over `group`, "row" the inputs, "replicated" nothing.
        lora: r, alpha, dropout and targets. A part is adapted if its last name is a target.
        writer: whether this rank, of all data-parallel replicas, writes the adapters.

    Attributes:
        in_local, out_local: K and, by name, N on this rank.
        columns: by name, each part's output columns on this rank; `lora_columns` are those of the adapted parts.
        adapted: names of the adapted parts.
        name: of this layer in the model, the same under every topology.
        draw: what the dropout of the next forward depends on; `model.qwen3_moe.DecoderLayer` sets it.
        enabled: whether the adapters have an effect; see `without_adapters`.
    """

    name = ""
    enabled = True
    draw: Draw | None = None

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

    @property
    def drops(self) -> bool:
        """Whether the adapters' input is subject to dropout: in training only."""
        return self.training and bool(self.adapted) and share(self.lora.dropout) > 0

    def scaling(self) -> float:
        """The factor of the adapters' output, which makes up for what was dropped of their input."""
        if not self.enabled:
            return 0.0
        kept = 1 - share(self.lora.dropout) / SHARES if self.drops else 1.0
        return self.lora.alpha / self.lora.r / kept

    def dropout(self, counters: Tensor) -> Dropout:
        """The dropout of this layer's input. `counters`, int64 [T], tell its rows apart; see `Dropout`."""
        assert self.draw is not None, "dropout needs the places of the tokens in the global batch"
        return Dropout(counters, key(self.draw.seed, self.name), self.inputs().start, share(self.lora.dropout))

    def frozen_weight(self, experts: int | None, dtype: torch.dtype, quant: QuantSettings | None) -> Weight:
        """Uninitialized frozen matrices, [N_local, K_local] or stacked over `experts`; with `quant` in 4 bits."""
        if quant is None:
            stack = () if experts is None else (experts,)
            return frozen(*stack, sum(self.out_local.values()), self.in_local, dtype=dtype)
        rows = {name: (n, self.rows(n)) for name, n in self.parts.items()}
        return QuantizedWeight(experts or 1, rows, self.in_features, self.inputs(), dtype, quant)

    def rows(self, n: int) -> slice:
        """This rank's slice of `n` outputs."""
        return part(n, self.rank, self.size) if self.mode == "column" else slice(0, n)

    def inputs(self) -> slice:
        """This rank's slice of the inputs."""
        return part(self.in_features, self.rank, self.size) if self.mode == "row" else slice(0, self.in_features)

    def weight_shard(self, path: str, name: str, weight: Weight, expert: int | None) -> Shard:
        """The shard of a part's frozen matrix. `expert` is its index in the stack; None for a layer without experts."""
        local: Tensor | Slot
        if isinstance(weight, Tensor):
            local = (weight.data if expert is None else weight.data[expert])[self.columns[name]]
        else:
            local = weight.slot(expert or 0, name)
        n = self.parts[name]
        return Shard(f"{path}.weight", (n, self.in_features), (self.rows(n), self.inputs()), local)

    def factor_shards(self, path: str, name: str, A: Tensor, B: Tensor) -> Iterator[Shard]:
        """The shards of a part's factors A [r, K_local] and B [N_local, r]. Rank 0 writes the replicated one."""
        n, r = self.parts[name], self.lora.r
        first_A, first_B = self.rank == 0 or self.mode == "row", self.rank == 0 or self.mode == "column"
        at_A, at_B = (slice(0, r), self.inputs()), (self.rows(n), slice(0, r))
        yield Shard(f"{path}.lora_A.weight", (r, self.in_features), at_A, A, self.writer and first_A, first_A)
        yield Shard(f"{path}.lora_B.weight", (n, r), at_B, B, self.writer and first_B, first_B)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is the base model."""
    layers = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized weight, to be loaded from a checkpoint and never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=host.device()), requires_grad=False)


def factor(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A LoRA factor of zeros."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=host.device()))
