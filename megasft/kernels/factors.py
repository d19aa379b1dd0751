"""The operators of `lora.factors` in Triton, for CUDA: each reads the activations once, and writes them once or not.

A program of most kernels has a tile of BM rows of one expert. The tiles of all experts are numbered in a row, which
each program walks by the offsets on the device; the grid has one more for each expert than there can be. Sums are in
fp32 and without atomics, so the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasft.kernels.dropout import mixed, row_hashes

SHORT, TALL = 32, 64  # BM: rows of a tile, few where there are few tiles
WIDE, RANK = 64, 64  # columns of a tile, and at most so many of a rank
FULL = 264  # tiles that fill a GPU: two for each multiprocessor of an H100
PARTS = 3


def down(
    x: Tensor,
    A: Tensor,
    scaling: float,
    counters: Tensor | None,
    key: int,
    first: int,
    share: int,
    offsets: Tensor | None,
) -> Tensor:
    """See `lora.factors`."""
    x, A = _inner(x), A.contiguous()
    h = x.new_empty(x.shape[0], A.shape[-2])
    launch = _Launch(x.shape[0], offsets)
    if x.shape[0]:
        block = _block(h.shape[1])
        grid = (launch.tiles, triton.cdiv(h.shape[1], block))
        _down[grid](x, A, _any(counters, x), launch.offsets, h, *x.shape, h.shape[1], launch.experts, scaling, key,
                    first, share, x.stride(0), counters is not None, first % 2, launch.grouped, launch.padded,
                    launch.rows, block, WIDE)  # fmt: skip
    return h


def add_up(y: Tensor, h: Tensor, B: list[Tensor], starts: list[int], offsets: Tensor | None) -> None:
    """See `lora.factors`."""
    launch = _Launch(y.shape[0], offsets)
    if y.shape[0]:
        r = B[0].shape[-1]
        grid = (launch.tiles, sum(triton.cdiv(b.shape[-2], WIDE) for b in B))
        _add_up[grid](y, h, *_padded([b.contiguous() for b in B]), launch.offsets, y.shape[0], h.shape[1], r,
                      y.stride(0), *_padded([b.shape[-2] for b in B], 0), *_padded(starts), launch.experts,
                      launch.grouped, launch.padded, launch.rows, WIDE, _block(r))  # fmt: skip


def up_gradient_h(gy: Tensor, B: list[Tensor], starts: list[int], scaling: float, offsets: Tensor | None) -> Tensor:
    """See `lora.factors`."""
    r = B[0].shape[-1]
    gy, gh, launch = _inner(gy), gy.new_empty(gy.shape[0], r * len(B)), _Launch(gy.shape[0], offsets)
    if gy.shape[0]:
        grid = (launch.tiles, len(B) * triton.cdiv(r, _block(r)))
        _gradient_h[grid](gy, *_padded([b.contiguous() for b in B]), gh, launch.offsets, gy.shape[0], gh.shape[1], r,
                          gy.stride(0), *_padded([b.shape[-2] for b in B], 0), *_padded(starts), launch.experts,
                          scaling, launch.grouped, launch.padded, launch.rows, WIDE, _block(r))  # fmt: skip
    return gh


def up_gradient_B(
    gy: Tensor, h: Tensor, B: list[Tensor], starts: list[int], offsets: Tensor | None, into: list[Tensor] | None = None
) -> list[Tensor]:
    """See `lora.factors`. `into`, of the shapes of B and contiguous: where gradients are added instead."""
    gB = into or [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B]
    r, gy = B[0].shape[-1], _inner(gy)
    launch = _Launch(gy.shape[0], offsets)
    grid = (launch.experts, sum(triton.cdiv(b.shape[-2], WIDE) for b in B), triton.cdiv(r, _block(r)))
    _gradient_B[grid](gy, h, *_padded(gB), launch.offsets, gy.shape[0], h.shape[1], r, gy.stride(0),
                      *_padded([b.shape[-2] for b in B], 0), *_padded(starts), into is not None, launch.grouped, TALL,
                      WIDE, _block(r))  # fmt: skip
    return gB


def down_gradient_A(
    gh: Tensor, x: Tensor, A: Tensor, counters: Tensor | None, key: int, first: int, share: int, offsets: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `lora.factors`. `into`, of A's shape and contiguous: where the gradient is added instead."""
    x, gA = _inner(x), torch.empty_like(A, memory_format=torch.contiguous_format) if into is None else into
    launch, block = _Launch(x.shape[0], offsets), _block(gh.shape[1])
    grid = (launch.experts, triton.cdiv(x.shape[1], WIDE), triton.cdiv(gh.shape[1], block))
    _gradient_A[grid](gh, x, _any(counters, x), launch.offsets, gA, *x.shape, gh.shape[1], key, first, share,
                      x.stride(0), into is not None, counters is not None, first % 2, launch.grouped, TALL, block,
                      WIDE)  # fmt: skip
    return gA


def down_gradient_x(
    gx: Tensor, gh: Tensor, A: Tensor, counters: Tensor | None, key: int, first: int, share: int, offsets: Tensor | None
) -> None:
    """See `lora.factors`."""
    launch = _Launch(gx.shape[0], offsets)
    if gx.shape[0]:
        grid = (launch.tiles, triton.cdiv(gx.shape[1], WIDE))
        _gradient_x[grid](gx, gh, A.contiguous(), _any(counters, gx), launch.offsets, *gx.shape, gh.shape[1],
                          launch.experts, key, first, share, gx.stride(0), counters is not None, first % 2,
                          launch.grouped, launch.padded, launch.rows, _block(gh.shape[1]), WIDE)  # fmt: skip


class _Launch:
    """The tiles of T rows. `offsets`: where each expert's rows end, or None for one layer."""

    def __init__(self, T: int, offsets: Tensor | None) -> None:
        self.grouped = offsets is not None
        self.offsets = 0 if offsets is None else offsets
        self.experts = 1 if offsets is None else len(offsets)
        self.padded = triton.next_power_of_2(self.experts)
        self.rows = TALL if triton.cdiv(T, TALL) >= FULL else SHORT
        self.tiles = triton.cdiv(T, self.rows) + self.experts - 1


def _inner(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def _any(counters: Tensor | None, x: Tensor) -> Tensor:
    return x if counters is None else counters.contiguous()


def _block(r: int) -> int:
    """Columns of a tile of h: Triton's products want powers of two, and 16 at least."""
    return min(RANK, max(16, triton.next_power_of_2(r)))


def _padded(parts: list, more: object = None) -> list:
    """One argument for each of PARTS: the kernels reach no more than there are."""
    assert len(parts) <= PARTS, f"{len(parts)} fused layers"
    return parts + [parts[-1] if more is None else more] * (PARTS - len(parts))


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _tile(offsets, T, experts, tile, GROUPED: tl.constexpr, E: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; no row where there is no such tile."""
    expert = 0
    row = tile * BM
    end = T
    if GROUPED:
        e = tl.arange(0, E)
        ends = tl.load(offsets + e, mask=e < experts, other=0)
        starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < experts), other=0)
        tiles = (ends - starts + BM - 1) // BM
        last = tl.associative_scan(tiles, 0, _plus)
        expert = tl.reduce(((last <= tile) & (e < experts)).to(tl.int32), 0, _plus)
        here = e == expert
        row = tl.reduce(tl.where(here, starts + (tile - last + tiles) * BM, 0), 0, _plus)
        end = tl.reduce(tl.where(here, ends, 0), 0, _plus)
    return expert, row, end


@triton.jit
def _group(offsets, T, expert, GROUPED: tl.constexpr):
    """(first, end) of an expert's rows."""
    start = 0
    end = T
    if GROUPED:
        end = tl.load(offsets + expert)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return start, end


@triton.jit
def _kept(value, row_bits, column, first, share, ODD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """value [BM, BK] of features `column` (even) and up, with zeros in place of what `lora.dropout` drops."""
    if ODD:  # each feature its own hash, where a pair lies in two tiles
        feature = (first + column + tl.arange(0, BK)).to(tl.uint32)
        bits = mixed(row_bits[:, None] ^ mixed(feature // 2)[None, :])
        halves = (bits >> ((feature % 2) * 16)[None, :]) & 0xFFFF
    else:
        pair = (first + column) // 2 + tl.arange(0, BK // 2)
        bits = mixed(row_bits[:, None] ^ mixed(pair.to(tl.uint32))[None, :])
        halves = tl.reshape(tl.join(bits & 0xFFFF, bits >> 16), BM, BK)
    return tl.where(halves < share.to(tl.uint32), 0.0, value).to(value.dtype)


@triton.jit
def _part(tile, b0, b1, b2, n0, n1, n2, c0, c1, c2, BN: tl.constexpr):
    """(number, B, its rows, its first column, the tile within it) of the fused layer that a tile of columns is of."""
    tiles0 = (n0 + BN - 1) // BN
    tiles1 = (n1 + BN - 1) // BN
    number = 0
    b = b0
    n = n0
    c = c0
    if tile >= tiles0 + tiles1:
        number = 2
        b = b2
        n = n2
        c = c2
        tile -= tiles0 + tiles1
    elif tile >= tiles0:
        number = 1
        b = b1
        n = n1
        c = c1
        tile -= tiles0
    return number, b, n, c, tile


@triton.jit(do_not_specialize=["T", "scaling", "key", "first", "share"])
def _down(x, A, counters, offsets, h, T, K, R, experts, scaling: tl.float32, key: tl.int64, first, share, stride,
          DROP: tl.constexpr, ODD: tl.constexpr, GROUPED: tl.constexpr, E: tl.constexpr, BM: tl.constexpr,
          BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    expert, row, end = _tile(offsets, T, experts, tl.program_id(0), GROUPED, E, BM)
    if row >= end:
        return
    m = row + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None]
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    A += tl.cast(expert, tl.int64) * R * K
    total = tl.full((BM, BR), 0, tl.float32)
    bits = tl.full((BM,), 0, tl.uint32)
    if DROP:
        bits = row_hashes(tl.load(counters + m, mask=m < end, other=0), key)
    for column in range(0, K, BK):
        k = column + tl.arange(0, BK)
        value = tl.load(x + at * stride + k[None, :], mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)
        if DROP:
            value = _kept(value, bits, column, first, share, ODD, BM, BK)
        factor = tl.load(A + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(value, tl.trans(factor), total, input_precision="ieee")
    inside = (m < end)[:, None] & (r < R)[None, :]
    tl.store(h + at * R + r[None, :], (total * scaling).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _add_up(y, h, b0, b1, b2, offsets, T, R, r, stride, n0, n1, n2, c0, c1, c2, experts, GROUPED: tl.constexpr,
            E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    expert, row, end = _tile(offsets, T, experts, tl.program_id(0), GROUPED, E, BM)
    if row >= end:
        return
    number, b, width, first, tile = _part(tl.program_id(1), b0, b1, b2, n0, n1, n2, c0, c1, c2, BN)
    m = row + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None]
    n = tile * BN + tl.arange(0, BN)
    b += tl.cast(expert, tl.int64) * width * r
    total = tl.full((BM, BN), 0, tl.float32)
    for column in range(0, r, BR):
        k = column + tl.arange(0, BR)
        value = tl.load(h + at * R + number * r + k[None, :], mask=(m < end)[:, None] & (k < r)[None, :], other=0.0)
        factor = tl.load(b + n[:, None] * r + k[None, :], mask=(n < width)[:, None] & (k < r)[None, :], other=0.0)
        total = tl.dot(value, tl.trans(factor), total, input_precision="ieee")
    inside = (m < end)[:, None] & (n < width)[None, :]
    place = y + at * stride + first + n[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "scaling"])
def _gradient_h(gy, b0, b1, b2, gh, offsets, T, R, r, stride, n0, n1, n2, c0, c1, c2, experts, scaling: tl.float32,
                GROUPED: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BR: tl.constexpr):  # fmt: skip
    expert, row, end = _tile(offsets, T, experts, tl.program_id(0), GROUPED, E, BM)
    if row >= end:
        return
    tiles = (r + BR - 1) // BR
    number = tl.program_id(1) // tiles
    _, b, width, first, _ = _part(number, b0, b1, b2, 1, 1, 1, c0, c1, c2, 1)
    if number == 0:
        width = n0
    elif number == 1:
        width = n1
    else:
        width = n2
    m = row + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None]
    k = (tl.program_id(1) % tiles) * BR + tl.arange(0, BR)
    b += tl.cast(expert, tl.int64) * width * r
    total = tl.full((BM, BR), 0, tl.float32)
    for column in range(0, width, BN):
        n = column + tl.arange(0, BN)
        value = tl.load(
            gy + at * stride + first + n[None, :], mask=(m < end)[:, None] & (n < width)[None, :], other=0.0
        )
        factor = tl.load(b + n[:, None] * r + k[None, :], mask=(n < width)[:, None] & (k < r)[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision="ieee")
    inside = (m < end)[:, None] & (k < r)[None, :]
    tl.store(gh + at * R + number * r + k[None, :], (total * scaling).to(gh.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _gradient_B(gy, h, g0, g1, g2, offsets, T, R, r, stride, n0, n1, n2, c0, c1, c2, ADD: tl.constexpr,
                GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    start, end = _group(offsets, T, expert, GROUPED)
    number, g, width, first, tile = _part(tl.program_id(1), g0, g1, g2, n0, n1, n2, c0, c1, c2, BN)
    n = tile * BN + tl.arange(0, BN)
    k = tl.program_id(2) * BR + tl.arange(0, BR)
    total = tl.full((BN, BR), 0, tl.float32)
    for row in range(start, end, BM):
        m = row + tl.arange(0, BM)
        at = m.to(tl.int64)[:, None]
        value = tl.load(
            gy + at * stride + first + n[None, :], mask=(m < end)[:, None] & (n < width)[None, :], other=0.0
        )
        low = tl.load(h + at * R + number * r + k[None, :], mask=(m < end)[:, None] & (k < r)[None, :], other=0.0)
        total = tl.dot(tl.trans(value), low, total, input_precision="ieee")
    g += tl.cast(expert, tl.int64) * width * r
    inside = (n < width)[:, None] & (k < r)[None, :]
    place = g + n[:, None] * r + k[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(g.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "key", "first", "share"])
def _gradient_A(gh, x, counters, offsets, gA, T, K, R, key: tl.int64, first, share, stride, ADD: tl.constexpr,
                DROP: tl.constexpr, ODD: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    start, end = _group(offsets, T, expert, GROUPED)
    column = tl.program_id(1) * BK
    k = column + tl.arange(0, BK)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    total = tl.full((BR, BK), 0, tl.float32)
    for row in range(start, end, BM):
        m = row + tl.arange(0, BM)
        at = m.to(tl.int64)[:, None]
        value = tl.load(x + at * stride + k[None, :], mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)
        if DROP:
            bits = row_hashes(tl.load(counters + m, mask=m < end, other=0), key)
            value = _kept(value, bits, column, first, share, ODD, BM, BK)
        low = tl.load(gh + at * R + r[None, :], mask=(m < end)[:, None] & (r < R)[None, :], other=0.0)
        total = tl.dot(tl.trans(low), value, total, input_precision="ieee")
    gA += tl.cast(expert, tl.int64) * R * K
    inside = (r < R)[:, None] & (k < K)[None, :]
    place = gA + r[:, None] * K + k[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(gA.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "key", "first", "share"])
def _gradient_x(gx, gh, A, counters, offsets, T, K, R, experts, key: tl.int64, first, share, stride, DROP: tl.constexpr,
                ODD: tl.constexpr, GROUPED: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    expert, row, end = _tile(offsets, T, experts, tl.program_id(0), GROUPED, E, BM)
    if row >= end:
        return
    m = row + tl.arange(0, BM)
    at = m.to(tl.int64)[:, None]
    column = tl.program_id(1) * BK
    k = column + tl.arange(0, BK)
    A += tl.cast(expert, tl.int64) * R * K
    total = tl.full((BM, BK), 0, tl.float32)
    for low in range(0, R, BR):
        r = low + tl.arange(0, BR)
        value = tl.load(gh + at * R + r[None, :], mask=(m < end)[:, None] & (r < R)[None, :], other=0.0)
        factor = tl.load(A + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision="ieee")
    if DROP:
        bits = row_hashes(tl.load(counters + m, mask=m < end, other=0), key)
        total = _kept(total, bits, column, first, share, ODD, BM, BK)
    inside = (m < end)[:, None] & (k < K)[None, :]
    place = gx + at * stride + k[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(gx.dtype.element_ty), mask=inside)
