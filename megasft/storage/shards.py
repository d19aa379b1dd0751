"""Which slice of which checkpoint tensor a rank holds: one table for loading, exporting and initializing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Shard:
    """The slice of one checkpoint tensor that this rank holds.

    `index` has one slice with explicit bounds per dimension of the full tensor. `local` is a view of the rank's own
    storage with the shape of the slice, or the slot of a matrix that is kept in 4 bits. `writer` is true on exactly one
    of all ranks that hold the slice, and that rank writes it; `first` is true on one rank per data-parallel replica.
    """

    name: str
    shape: tuple[int, ...]
    index: Index
    local: Any
    writer: bool = True
    first: bool = True


class Sharded(nn.Module):
    """A module that lists its checkpoint tensors, by their Hugging Face names relative to the module."""

    def base_shards(self) -> Iterator[Shard]:
        """The frozen tensors."""
        raise NotImplementedError

    def adapter_shards(self) -> Iterator[Shard]:
        """The LoRA tensors: `<linear>.lora_A.weight` [r, K] and `<linear>.lora_B.weight` [N, r]."""
        yield from ()


def consecutive(lengths: Iterable[int]) -> Iterator[slice]:
    """Consecutive slices of these lengths, from 0."""
    start = 0
    for n in lengths:
        yield slice(start, start + n)
        start += n


def full_index(*shape: int) -> Index:
    """The index of a full tensor of this shape."""
    return tuple(slice(0, n) for n in shape)


def part(n: int, rank: int, size: int) -> slice:
    """The rank-th of `size` equal parts of n."""
    return slice(n // size * rank, n // size * (rank + 1))


def leaf(name: str) -> str:
    """The last part of a dotted name: `up_proj` of `model.layers.0.mlp.experts.7.up_proj`."""
    return name.rpartition(".")[2]
