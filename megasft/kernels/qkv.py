"""Queries, keys and values of attention in Triton, for CUDA: one pass each way, in fp32, rounded once.

A program has ROWS tokens of one head: of queries, keys or values, in the order in which they lie in qkv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32


def split(
    qkv: Tensor, heads: int, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """See `megasft.model.qkv.split_qkv`."""
    qkv, d = qkv.contiguous(), len(q_weight)
    groups = (qkv.shape[1] // d - heads) // 2
    q, k, v = (qkv.new_empty(len(qkv), n, d) for n in (heads, groups, groups))
    if len(qkv):
        _split[_grid(qkv, d)](
            qkv, q_weight, k_weight, cos_sin.contiguous(), q, k, v, len(qkv), heads, groups, eps, d // 2, ROWS,
            _block(d),
        )  # fmt: skip
    return q, k, v


def gradient(
    gq: Tensor, gk: Tensor, gv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
) -> Tensor:
    """The gradient of qkv [T, (h + 2 g) d] from those of q [T, h, d], k and v [T, g, d]."""
    qkv, g, (tokens, heads, d) = (
        qkv.contiguous(),
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        gq.shape,
    )
    if tokens:
        _gradient[_grid(qkv, d)](
            gq.contiguous(), gk.contiguous(), gv.contiguous(), qkv, q_weight, k_weight, cos_sin.contiguous(), g, tokens,
            heads, gk.shape[1], eps, d // 2, ROWS, _block(d),
        )  # fmt: skip
    return g


def _grid(qkv: Tensor, d: int) -> tuple[int, int]:
    return triton.cdiv(len(qkv), ROWS), qkv.shape[1] // d


def _block(d: int) -> int:
    return triton.next_power_of_2(d // 2)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _places(heads, groups, tokens, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What a program reads of qkv, and of q, k or v: (head, rows, first halves in qkv, those in its part, mask)."""
    head = tl.program_id(1)
    part = head
    width = heads
    if head >= heads + groups:
        part = head - heads - groups
        width = groups
    elif head >= heads:
        part = head - heads
        width = groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < tokens)[:, None] & (column < HALF)
    wide = row.to(tl.int64)[:, None]
    place = (wide * (heads + 2 * groups) + head) * (2 * HALF) + column
    return head, row, place, (wide * width + part) * (2 * HALF) + column, inside


@triton.jit
def _turned(cos_sin, row, tokens, inside, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines of the first half, which the second repeats."""
    at = row.to(tl.int64)[:, None] * (2 * HALF) + tl.arange(0, BLOCK)[None, :]
    cos = tl.load(cos_sin + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(cos_sin + tl.cast(tokens, tl.int64) * (2 * HALF) + at, mask=inside, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit(do_not_specialize=["tokens", "eps"])
def _split(qkv, q_weight, k_weight, cos_sin, q, k, v, tokens, heads, groups, eps: tl.float32, HALF: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head, row, place, at, inside = _places(heads, groups, tokens, HALF, ROWS, BLOCK)
    low = tl.load(qkv + place, mask=inside, other=0.0)
    high = tl.load(qkv + place + HALF, mask=inside, other=0.0)
    if head >= heads + groups:
        tl.store(v + at, low, mask=inside)
        tl.store(v + at + HALF, high, mask=inside)
        return
    weight = q_weight
    y = q
    if head >= heads:
        weight = k_weight
        y = k
    column = tl.arange(0, BLOCK)
    a, b = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt(tl.reduce(a * a + b * b, 1, _plus) / (2 * HALF) + eps)[:, None]
    a *= scale * tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    b *= scale * tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    cos, sin = _turned(cos_sin, row, tokens, inside, HALF, BLOCK)
    tl.store(y + at, (a * cos - b * sin).to(q.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, (b * cos + a * sin).to(q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _gradient(gq, gk, gv, qkv, q_weight, k_weight, cos_sin, g, tokens, heads, groups, eps: tl.float32,
              HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head, row, place, at, inside = _places(heads, groups, tokens, HALF, ROWS, BLOCK)
    if head >= heads + groups:
        tl.store(g + place, tl.load(gv + at, mask=inside), mask=inside)
        tl.store(g + place + HALF, tl.load(gv + at + HALF, mask=inside), mask=inside)
        return
    weight = q_weight
    gy = gq
    if head >= heads:
        weight = k_weight
        gy = gk
    column = tl.arange(0, BLOCK)
    a = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + place + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.reduce(a * a + b * b, 1, _plus) / (2 * HALF) + eps)[:, None]
    a, b = a * scale, b * scale
    cos, sin = _turned(cos_sin, row, tokens, inside, HALF, BLOCK)
    low = tl.load(gy + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(gy + at + HALF, mask=inside, other=0.0).to(tl.float32)
    ga, gb = low * cos + high * sin, high * cos - low * sin
    ga *= tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    gb *= tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    mean = (tl.reduce(ga * a + gb * b, 1, _plus) / (2 * HALF))[:, None]
    tl.store(g + place, (scale * (ga - a * mean)).to(g.dtype.element_ty), mask=inside)
    tl.store(g + place + HALF, (scale * (gb - b * mean)).to(g.dtype.element_ty), mask=inside)
