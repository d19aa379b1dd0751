"""Which part of which checkpoint tensor a rank holds: one table serves loading, exporting and initialising."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Shard:
    """The part of one checkpoint tensor that this rank holds.

    `local` is a view of the rank's own storage with the shape of `whole[index]`, or the slot for a matrix that is kept
    in 4 bits; `index` has one slice with explicit ends for each dimension. Of all the ranks that hold this part,
    `writer` says whether this is the one to write it, and `first` the same of those that hold it for one data-parallel
    replica.
    """

    name: str
    shape: tuple[int, ...]
    index: Index
    local: Any
    writer: bool = True
    first: bool = True


class Sharded(nn.Module):
    """A module that knows its checkpoint tensors. Names are Hugging Face's, from the layer's own folder on."""

    def base_shards(self) -> Iterator[Shard]:
        """The frozen tensors."""
        raise NotImplementedError

    def adapter_shards(self) -> Iterator[Shard]:
        """The LoRA tensors: `<linear>.lora_A.weight` [r, K] and `<linear>.lora_B.weight` [N, r]."""
        yield from ()


def consecutive(lengths: Iterable[int]) -> Iterator[slice]:
    """Slices of these lengths, one after the other."""
    start = 0
    for n in lengths:
        yield slice(start, start + n)
        start += n


def whole(*shape: int) -> Index:
    """The index that takes all of a tensor."""
    return tuple(slice(0, n) for n in shape)


def part(n: int, rank: int, size: int) -> slice:
    """The rank-th of `size` equal parts of n."""
    return slice(n // size * rank, n // size * (rank + 1))


def leaf(name: str) -> str:
    """The last name of a dotted one: `up_proj` of `model.layers.0.mlp.experts.7.up_proj`."""
    return name.rpartition(".")[2]
