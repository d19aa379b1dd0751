"""A rank's shard of frozen matrices in 4 bits: fused along their outputs and stacked over experts.

Only codes and scales stay in memory. `dequantize` writes to a workspace that all layers share, so at most one layer
exists in full precision at a time, and its result is valid until the next call.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasft import host
from megasft.config.schema import QuantSettings
from megasft.quant import kernels
from megasft.quant.kernels import GROUP
from megasft.quant.nf4 import DYNAMIC, Quantized


class QuantizedWeight(nn.Module):
    """The weights [E, N_local, K_local] of E matrices, each the fusion of several parts along the outputs.

    Args:
        experts: E; 1 for a linear layer.
        parts: by name, each part's N in the checkpoint and the rows that this rank holds.
        in_features: K in the checkpoint.
        inputs: the inputs that this rank holds. They start and end at block boundaries.
        dtype: dtype of the dequantized weights, bf16 or fp32.
    """

    def __init__(
        self,
        experts: int,
        parts: Mapping[str, tuple[int, slice]],
        in_features: int,
        inputs: slice,
        dtype: torch.dtype,
        settings: QuantSettings,
    ) -> None:
        super().__init__()
        size = settings.block_size
        assert inputs.start % size == inputs.stop % size == in_features % size == 0
        self.settings, self.dtype, self.experts = settings, dtype, experts
        self.blocks, self.blocks_per_row = slice(inputs.start // size, inputs.stop // size), in_features // size
        self.parts = {}
        row = group = 0
        for number, (name, (_, rows)) in enumerate(parts.items()):
            groups = slice(rows.start * self.blocks_per_row // GROUP, -(-rows.stop * self.blocks_per_row // GROUP))
            height, length = rows.stop - rows.start, groups.stop - groups.start
            place = _Place(number, rows, slice(row, row + height), groups, slice(group, group + length))
            self.parts[name] = place
            row, group = row + height, group + length
        self.shape = (experts, row, inputs.stop - inputs.start)

        def storage(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=host.device())

        blocks = self.blocks.stop - self.blocks.start
        self.packed = nn.Buffer(storage(experts, row, self.shape[2] // 2, dtype=torch.uint8))
        self.scales = nn.Buffer(storage(experts, row, blocks, dtype=torch.uint8 if settings.double else torch.float32))
        if settings.double:
            self.groups = nn.Buffer(storage(experts, group, dtype=torch.float32))
            self.means = nn.Buffer(storage(experts, len(parts), dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def slot(self, expert: int, part: str) -> "Slot":
        """The place of one quantized matrix of the checkpoint."""
        return Slot(self, expert, part)

    def dequantize(self, first: int = 0, last: int = 1) -> Tensor:
        """Dequantize matrices `first` to `last` into the workspace: [last - first, N_local, K_local]."""
        _, n, k = self.shape
        out = workspace(self.dtype, (last - first) * n * k).view(last - first, n, k)
        scales = self._scales(first, last) if self.settings.double else self.scales[first:last]
        kernels.dequantize_nf4(self.packed[first:last], scales, out, self.settings.block_size)
        return out

    @property
    def at_once(self) -> int:
        """How many matrices are dequantized together at most."""
        most = self.settings.experts_at_once or host.experts_at_once()
        # bitsandbytes counts weights in an int32 on CUDA (`cdequantize_blockwise_*`)
        return min(most, max(1, (2**31 - 1) // (self.shape[1] * self.shape[2])))

    def runs(self, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Split the experts that have rows into runs (first, last) of at most `at_once` consecutive ones.

        `ends` [E] are the ends of each expert's rows.
        """
        most, first = self.at_once, None
        for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if first is not None and (start == end or e - first == most):
                yield first, e
                first = None
            if start < end and first is None:
                first = e
        if first is not None:
            yield first, len(ends)

    def _scales(self, first: int, last: int) -> Tensor:
        """Dequantized scales, fp32 [last - first, N_local, blocks]."""
        codes, groups, means = (buffer[first:last] for buffer in (self.scales, self.groups, self.means))
        starts = [place.to_rows.start for place in self.parts.values()]
        return torch.ops.megasft.dequantize_scales(
            codes, _dynamic(codes.device), groups, self._group_of_each, means, starts
        )

    @functools.cached_property
    def _group_of_each(self) -> Tensor | None:
        """The group of each scale of a matrix, int32 [N_local * blocks]; None if groups are consecutive."""
        return _group_of_each(tuple(self.parts.values()), self.blocks.start, self.blocks.stop, self.blocks_per_row,
                              self.packed.device)  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Rows and scale groups of a checkpoint matrix that this rank holds, and where it stores them."""

    number: int
    rows: slice
    to_rows: slice
    groups: slice
    to_groups: slice


@dataclass(frozen=True)
class Slot:
    """The place of one matrix of the checkpoint in a QuantizedWeight."""

    weight: QuantizedWeight
    expert: int
    part: str

    def fill(self, matrix: Quantized) -> None:
        """Store this rank's slice of a full quantized matrix."""
        weight, e, place = self.weight, self.expert, self.weight.parts[self.part]
        size = weight.settings.block_size // 2
        columns = slice(weight.blocks.start * size, weight.blocks.stop * size)
        weight.packed[e, place.to_rows] = matrix["packed"][place.rows, columns]
        weight.scales[e, place.to_rows] = matrix["scales"][place.rows, weight.blocks]
        if weight.settings.double:
            weight.groups[e, place.to_groups] = matrix["groups"][place.groups]
            weight.means[e, place.number] = matrix["mean"]


# All layers of a kind share this table, because it depends only on how their matrices are sliced.
@functools.lru_cache(maxsize=64)
def _group_of_each(
    parts: tuple[_Place, ...], first: int, last: int, blocks_per_row: int, device: torch.device
) -> Tensor | None:
    rows = torch.cat(
        [
            torch.arange(p.rows.start, p.rows.stop)[:, None] * blocks_per_row
            + torch.arange(first, last)
            - (p.groups.start - p.to_groups.start) * GROUP
            for p in parts
        ]
    )
    found = rows.flatten() // GROUP
    if found.numel() % GROUP == 0 and torch.equal(found, torch.arange(found.numel()) // GROUP):
        return None
    return found.to(device=device, dtype=torch.int32)


@functools.cache
def _dynamic(device: torch.device) -> Tensor:
    return DYNAMIC.to(device)


_workspaces: dict[torch.dtype, Tensor] = {}


def workspace(dtype: torch.dtype, numel: int) -> Tensor:
    """The first `numel` elements of the one buffer of this dtype, which grows on demand."""
    held = _workspaces.get(dtype)
    if held is None or held.numel() < numel or held.device != host.device():
        _workspaces.pop(dtype, None)
        held = None  # drop the last reference, so that the old buffer is freed before the new one is allocated
        _workspaces[dtype] = held = torch.empty(numel, dtype=dtype, device=host.device())
    return held[:numel]


def workspace_bytes() -> int:
    """Bytes that the workspace occupies now."""
    return sum(held.nbytes for held in _workspaces.values())


# --- scales that are quantized themselves -----------------------------------------------------------------------------


def _dequantize_scales(
    codes: Tensor, table: Tensor, groups: Tensor, group_of_each: Tensor | None, means: Tensor, starts: list[int]
) -> Tensor:
    """table[codes] x the scale of each one's group + the mean of its part: codes uint8 [E, N, blocks] -> fp32.

    table: fp32 [256]. groups: fp32 [E, groups]; `group_of_each`: int32 [N * blocks], or None where every GROUP scales
    share the next one. means: fp32 [E, parts]; parts start at the rows `starts`.
    """
    found = torch.index_select(table, 0, codes.flatten().int())
    if group_of_each is None:
        found = found.view(-1, GROUP).mul_(groups.reshape(-1, 1)).view(codes.shape)
    else:
        found = found.view(codes.shape).mul_(groups.index_select(1, group_of_each).view(codes.shape))
    for number, (start, end) in enumerate(itertools.pairwise([*starts, codes.shape[1]])):
        found[:, start:end].add_(means[:, number, None, None])
    return found


def _on_cuda(*args: object) -> Tensor:
    from megasft.kernels import scales  # imports Triton, which comes with torch's CUDA builds

    return scales.dequantize_scales(*args)  # type: ignore[arg-type]


_library = torch.library.Library("megasft", "FRAGMENT")
_library.define(
    "dequantize_scales(Tensor codes, Tensor table, Tensor groups, Tensor? group_of_each, Tensor means, int[] starts)"
    " -> Tensor"
)
_library.impl("dequantize_scales", _dequantize_scales, "CPU")
_library.impl("dequantize_scales", _on_cuda, "CUDA")
_library.impl("dequantize_scales", lambda codes, table, *_: table.new_empty(codes.shape), "Meta")
