"""The operators of `model.copies` in Triton, for CUDA.

Copies are sorted by counting: a program counts the choices of its tokens for each expert, then, in a second launch,
adds the counts of the experts and tokens before its own, and numbers its copies. The order of programs has no effect.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens of a tile
PROGRAMS = 256  # at most, or each would read too many counts of others
WIDE = 1024  # columns of a tile of sums


def sort_copies(
    chosen: Tensor, places: Tensor | None, first: int, local: int, experts: int, copies: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `model.copies.Copies.of`: tokens, slots, ends and counters."""
    (t, k), padded = chosen.shape, triton.next_power_of_2(local)
    tokens, ends = chosen.new_empty(copies), chosen.new_zeros(local) if not t else chosen.new_empty(local)
    slots = torch.empty(t, k, dtype=torch.int32, device=chosen.device)
    counters = chosen.new_empty(0 if places is None else copies, dtype=torch.int64)
    if t:
        tiles = triton.cdiv(triton.cdiv(t, ROWS), PROGRAMS)
        programs = triton.cdiv(t, tiles * ROWS)
        counts = chosen.new_empty(programs, local)
        _count[(programs,)](chosen, counts, t, first, local, tiles, chosen.stride(0), k, ROWS, padded)
        given, step = (chosen, 0) if places is None else (places, places.stride(0))
        _place[(programs,)](chosen, given, counts, tokens, slots, ends, counters, t, first, local, experts, tiles,
                            programs, chosen.stride(0), step, k, places is not None, ROWS, padded)  # fmt: skip
    return tokens, slots, ends, counters


def sum_copies(y: Tensor, slots: Tensor) -> Tensor:
    """See `model.copies.Copies.add_up`."""
    y, (t, k) = y.contiguous(), slots.shape
    out = y.new_empty(t, y.shape[1])
    if out.numel():
        grid = (t, triton.cdiv(y.shape[1], WIDE))
        _sum[grid](y, slots, out, y.shape[1], k, WIDE)
    return out


def to_copies(values: Tensor, slots: Tensor, copies: int) -> Tensor:
    """See `model.copies.Copies.pick`."""
    out = values.new_empty(copies)
    if slots.numel():
        grid = (triton.cdiv(slots.numel(), WIDE),)
        _spread[grid](values, slots, out, slots.numel(), slots.shape[1], *values.stride(), WIDE)
    return out


def from_copies(values: Tensor, slots: Tensor) -> Tensor:
    """The transpose of `to_copies`: 0 where there is no copy."""
    out = values.new_empty(slots.shape)
    if slots.numel():
        _collect[(triton.cdiv(slots.numel(), WIDE),)](values.contiguous(), slots, out, slots.numel(), WIDE)
    return out


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _choice(chosen, row, t, first, stride, j, e):
    """The j-th choice of each token as an expert of this rank [ROWS], and whether it is that of a column [ROWS, E]."""
    expert = tl.load(chosen + row.to(tl.int64) * stride + j, mask=row < t, other=-1) - first
    expert = tl.where(row < t, expert, -1)
    return expert, expert[:, None] == e[None, :]


@triton.jit(do_not_specialize=["t", "first", "tiles"])
def _count(chosen, counts, t, first, local, tiles, stride, K: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):
    e = tl.arange(0, E)
    total = tl.full((E,), 0, tl.int32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        for j in range(K):
            _, here = _choice(chosen, row, t, first, stride, j, e)
            total += tl.reduce(here.to(tl.int32), 0, _plus)
    tl.store(counts + tl.program_id(0) * local + e, total, mask=e < local)


@triton.jit(do_not_specialize=["t", "first", "tiles", "programs"])
def _place(chosen, places, counts, tokens, slots, ends, counters, t, first, local, experts, tiles, programs, stride,
           step, K: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):  # fmt: skip
    e = tl.arange(0, E)
    total = tl.full((E,), 0, tl.int32)
    next_slot = tl.full((E,), 0, tl.int32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        some = tl.load(
            counts + program[:, None] * local + e[None, :], mask=(program < programs)[:, None] & (e < local)[None, :],
            other=0,
        )  # fmt: skip
        total += tl.reduce(some, 0, _plus)
        next_slot += tl.reduce(tl.where((program < tl.program_id(0))[:, None], some, 0), 0, _plus)
    last = tl.associative_scan(total, 0, _plus)
    if tl.program_id(0) == 0:
        tl.store(ends + e, last, mask=e < local)
    next_slot += last - total
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        marked = tl.full((ROWS, E), 0, tl.int32)
        for j in range(K):
            _, here = _choice(chosen, row, t, first, stride, j, e)
            marked += here.to(tl.int32)
        slot = next_slot[None, :] + tl.associative_scan(marked, 0, _plus) - marked
        for j in range(K):
            expert, here = _choice(chosen, row, t, first, stride, j, e)
            ours = (expert >= 0) & (expert < local)
            at = tl.reduce(tl.where(here, slot, 0), 1, _plus)
            tl.store(slots + row.to(tl.int64) * K + j, tl.where(ours, at, -1), mask=row < t)
            tl.store(tokens + at, row, mask=ours)
            if COUNTED:
                place = tl.load(places + row.to(tl.int64) * step, mask=row < t, other=0)
                tl.store(counters + at, place * experts + expert + first, mask=ours)
        next_slot += tl.reduce(marked, 0, _plus)


@triton.jit
def _sum(y, slots, out, width, K: tl.constexpr, WIDE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.full((WIDE,), 0, tl.float32)
    for j in range(K):
        slot = tl.load(slots + token * K + j)
        there = (slot >= 0) & (column < width)
        total += tl.load(y + slot.to(tl.int64) * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["n"])
def _spread(values, slots, out, n, k, rows, columns, WIDE: tl.constexpr):
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    slot = tl.load(slots + at, mask=at < n, other=-1)
    value = tl.load(values + (at // k).to(tl.int64) * rows + (at % k) * columns, mask=slot >= 0)
    tl.store(out + slot, value, mask=slot >= 0)


@triton.jit(do_not_specialize=["n"])
def _collect(values, slots, out, n, WIDE: tl.constexpr):
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    slot = tl.load(slots + at, mask=at < n, other=-1)
    tl.store(out + at, tl.load(values + slot, mask=slot >= 0, other=0), mask=at < n)
