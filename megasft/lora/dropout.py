"""Dropout of the adapters' input as a function of counters: nothing is drawn in sequence, no mask is stored.

Whether an adapter sees an element of its input depends on the seed of the step, the layer's name, the token's place in
the global batch, its expert and the number of the feature in the full layer. So losses and gradients do not depend on
the topology, on how a batch is cut or on where a run was resumed, and backward and recomputation find the same elements
again.

A 32-bit hash decides for two neighboring features, 16 bits for each, so p is a multiple of 2^-16. It is the XOR of a
row's hash and the hash of the pair of features, mixed by two multiplications ("lowbias32" of Chris Wellons,
https://nullprogram.com/blog/2018/07/31, public domain). A row's hash is the finalizer of MurmurHash3 (Austin Appleby,
public domain), 64 bits wide, of its counter and the key of step and layer.

T rows (tokens, or tokens of experts), K features of this rank.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

SHARES = 2**16  # p is a multiple of 1 / SHARES
MIX_32 = (16, 0x7FEB352D, 15, 0x846CA68B, 16)  # shift, multiply, shift, multiply, shift
MIX_64 = (33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a number of so many bytes
_BLOCK = 2**17  # hashes that are mixed together on a CPU, so that they stay in its second-level cache


@dataclass(frozen=True)
class Draw:
    """What the dropout of a micro batch depends on, besides the layer.

    seed: of the optimizer step. places: int64 [T], the place of each token in the global batch.
    """

    seed: int
    places: Tensor

    def shard(self, group: dist.ProcessGroup) -> Tensor:
        """The places of this rank's sequence shard."""
        return self.places.chunk(group.size())[group.rank()]


@dataclass(frozen=True)
class Dropout:
    """Zeroes the same elements of every x [T, K] that it is called with.

    Args:
        counters: int64 [T], tell a row from others: its place, or with experts place * experts + expert.
        key: of step and layer.
        first: the number of this rank's first feature in the full layer.
        share: how many of 65,536 elements are dropped.
    """

    counters: Tensor
    key: int
    first: int
    share: int

    @cached_property
    def rows(self) -> np.ndarray:
        """The hash of each row, uint32 [T], on CPUs."""
        hashes = (self.counters ^ self.key).numpy().view(np.uint64)
        return _mixed(hashes, np.empty_like(hashes), MIX_64).astype(np.uint32)

    def __call__(self, x: Tensor) -> Tensor:
        """A copy of x [T, K] with zeros in place of what is dropped, on CPUs. It is not scaled."""
        return _drop(x, self.rows, self.first, self.share)


def share(p: float) -> int:
    """The probability p as a number of 65,536ths, never all of them."""
    return min(SHARES - 1, round(p * SHARES))


@lru_cache(4096)
def key(seed: int, name: str) -> int:
    """A signed 64-bit number that depends on nothing but the seed of the step and the name of the layer."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


# --- places on their way to the experts -------------------------------------------------------------------------------


class JoinPlaces(torch.autograd.Function):
    """Routing weights fp32 [S, k] and places int64 [S] modulo 2^29 as one fp64 [S, k]: the place in the upper 32 bits.

    megatron-core's all-to-all dispatcher moves routing weights, without computing with them, to the ranks of the
    experts; so the places arrive with them, without a collective of their own. Gradients pass through as plain numbers.
    """

    @staticmethod
    def forward(ctx: object, weights: Tensor, places: Tensor) -> Tensor:
        # The added bit keeps this fp64, which nobody uses as a number, from being a subnormal or a NaN.
        upper = (places % 2**29 + 2**30)[:, None] << 32
        return (upper | (weights.contiguous().view(torch.int32).long() & 0xFFFFFFFF)).view(torch.float64)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.float(), None


class SplitPlaces(torch.autograd.Function):
    """The opposite of `JoinPlaces` for what has arrived: fp64 [T] -> routing weights fp32 [T], places int64 [T]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, joined: Tensor) -> tuple[Tensor, Tensor]:
        bits = joined.contiguous().view(torch.int64)
        weights, places = bits.to(torch.int32).view(torch.float32), (bits >> 32) - 2**30
        ctx.mark_non_differentiable(places)
        return weights, places

    @staticmethod
    def backward(ctx: object, grad: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return grad.double()


# --- by numpy on CPUs; on CUDA the kernels of `lora.factors` drop what they load -------------------------------------


def _drop(x: Tensor, hashes: np.ndarray, first: int, share: int) -> Tensor:
    pairs = _pair_hashes(first // 2, (first + x.shape[1] + 1) // 2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    # The bits of a number times 0 are those of 0, whatever it is; masked_fill_ takes 1.6 times as long.
    integers = _INTEGERS[x.itemsize]
    source, target = x.detach().view(integers).numpy(), out.view(integers).numpy()
    height = max(1, min(len(hashes), _BLOCK // max(1, len(pairs))))
    block, spare = (np.empty((height, len(pairs)), np.uint32) for _ in range(2))
    for top in range(0, len(hashes), height):
        some = hashes[top : top + height, None]
        bits = _mixed(np.bitwise_xor(some, pairs, out=block[: len(some)]), spare[: len(some)], MIX_32)
        kept = bits.view("<u2")[:, first % 2 : first % 2 + x.shape[1]] >= share
        at = slice(top, top + height)
        np.multiply(source[at], kept, out=target[at])
    return out


@lru_cache(64)
def _pair_hashes(start: int, stop: int) -> np.ndarray:
    numbers = np.arange(start, stop, dtype=np.uint32)
    return _mixed(numbers, np.empty_like(numbers), MIX_32)


def _mixed(bits: np.ndarray, spare: np.ndarray, mix: tuple[int, int, int, int, int]) -> np.ndarray:
    """Mix unsigned integers in place. `spare` has their shape and type."""
    for step, number in enumerate(mix):
        if step % 2:
            np.multiply(bits, bits.dtype.type(number), out=bits)
        else:
            np.bitwise_xor(bits, np.right_shift(bits, number, out=spare), out=bits)
    return bits
