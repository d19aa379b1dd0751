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
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.functional import Weight, frozen_linear, lora_linear
from megasft.quant.weight import QuantizedWeight
from megasft.storage.shards import Index, Shard, Sharded, consecutive, leaf, part, whole


class LoraLinear(Sharded):
    """One frozen matrix, or several fused along their outputs, each with an adapter of its own if it is a target.

    Args:
        in_features: K of the whole layer.
        parts: name to N of the whole layer, in the order in which the fused outputs stand on every rank.
        mode: "column", "row" or "replicated" (on a sequence shard, as the router).
        lora: r, alpha, dropout and targets; a part is adapted if its last name is a target.
        group: the tensor-parallel group.
        dtype: of all parameters.
        writer: whether this rank is the one of its data-parallel replicas that writes adapters.
        quant: keep the frozen matrices in 4 bits; None: in `dtype`.

    Parameters: weight [N_local, K_local] (or a QuantizedWeight), lora_A [r * adapted parts, K_local], lora_B.<part>
    [N_local, r].
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        mode: Literal["column", "row", "replicated"],
        lora: LoraSettings,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        writer: bool,
        quant: QuantSettings | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.group, self.lora, self.writer = mode, group, lora, writer
        self.in_features, self.parts = in_features, dict(parts)
        self.rank, self.size = group.rank(), group.size()
        in_local = in_features // self.size if mode == "row" else in_features
        out_local = {name: n // self.size if mode == "column" else n for name, n in parts.items()}
        self.columns = dict(zip(out_local, consecutive(out_local.values()), strict=True))
        self.weight: Weight
        if quant is None:
            self.weight = frozen(sum(out_local.values()), in_local, dtype=dtype)
        else:
            rows = {name: (n, self._index(n)[0]) for name, n in parts.items()}
            self.weight = QuantizedWeight(1, rows, in_features, self._index(0)[1], dtype, quant)

        self.adapted = [name for name in parts if leaf(name) in lora.targets]
        self.lora_columns = [self.columns[name] for name in self.adapted]
        self.lora_B = nn.ParameterDict()
        if self.adapted:
            self.lora_A = nn.Parameter(
                torch.zeros(lora.r * len(self.adapted), in_local, dtype=dtype, device=host.device())
            )
            for name in self.adapted:
                self.lora_B[leaf(name)] = nn.Parameter(
                    torch.zeros(out_local[name], lora.r, dtype=dtype, device=host.device())
                )
        for matrix, split in (("A", mode == "row"), ("B", mode == "column")):
            for parameter in self._adapters(matrix):
                # `tensor_model_parallel` says that each rank has its own part, which counts in the gradient norm.
                parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
                parameter.sequence_parallel = not split  # type: ignore[attr-defined]

    def _adapters(self, matrix: str) -> list[nn.Parameter]:
        if not self.adapted:
            return []
        return [self.lora_A] if matrix == "A" else list(self.lora_B.values())

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
        dropped = self.lora.dropout if self.training else 0.0
        # In column mode all ranks hold the same x and must drop the same elements; otherwise each has its own part.
        mask = dropout_mask(x, dropped, "lora" if self.mode == "column" else "lora-sharded")
        A, B = self.lora_A.to(x.dtype), [self.lora_B[leaf(name)].to(x.dtype) for name in self.adapted]
        return lora_linear(x, weight, A, B, self.lora_columns, self.lora.alpha / self.lora.r / (1 - dropped), mask)

    def base_shards(self) -> Iterator[Shard]:
        for name, n in self.parts.items():
            weight = self.weight
            local = weight.data[self.columns[name]] if isinstance(weight, Tensor) else weight.slot(0, name)
            yield Shard(f"{name}.weight", (n, self.in_features), self._index(n), local)

    def _index(self, n: int) -> tuple[slice, slice]:
        """This rank's rows and columns of a whole [n, K]."""
        k = self.in_features
        return (
            part(n, self.rank, self.size) if self.mode == "column" else slice(0, n),
            part(k, self.rank, self.size) if self.mode == "row" else slice(0, k),
        )

    def adapter_shards(self) -> Iterator[Shard]:
        r, k = self.lora.r, self.in_features
        first = self.rank == 0
        for i, name in enumerate(self.adapted):
            n = self.parts[name]
            A, B = self.lora_A.data[i * r : (i + 1) * r], self.lora_B[leaf(name)].data
            at = (slice(0, r), part(k, self.rank, self.size)) if self.mode == "row" else whole(r, k)
            yield self._shard(f"{name}.lora_A.weight", (r, k), at, A, first or self.mode == "row")
            at = (part(n, self.rank, self.size), slice(0, r)) if self.mode == "column" else whole(n, r)
            yield self._shard(f"{name}.lora_B.weight", (n, r), at, B, first or self.mode == "column")

    def _shard(self, name: str, shape: tuple[int, int], index: Index, local: Tensor, first: bool) -> Shard:
        return Shard(name, shape, index, local, self.writer and first, first)


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Storage for a weight that is read from a checkpoint and never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=host.device()), requires_grad=False)


def dropout_mask(x: Tensor, p: float, random_state: str) -> Tensor | None:
    """Which elements of x an adapter sees, drawn from a state of megatron-core's tracker; None if it sees all."""
    if p == 0.0:
        return None
    with get_cuda_rng_tracker().fork(random_state):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
