"""The operators of `model.routing` in Triton, for CUDA. A program has ROWS tokens and all experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


def route(logits: Tensor, k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    """See `model.routing.top_experts`. Of equal logits the first ones are taken; a NaN counts as the largest."""
    logits, (tokens, experts) = logits.contiguous(), logits.shape
    weights, chosen = logits.new_empty(tokens, k), logits.new_empty(tokens, k, dtype=torch.int32)
    if tokens:
        _route[(triton.cdiv(tokens, ROWS),)](
            logits, weights, chosen, tokens, experts, k, over_all, ROWS, triton.next_power_of_2(experts)
        )
    return weights, chosen


def route_gradient(g: Tensor, logits: Tensor, experts: Tensor, over_all: bool) -> Tensor:
    """The gradient of the logits [T, E], from that of the weights [T, k]."""
    logits, out = logits.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
    tokens, k = experts.shape
    if tokens:
        _route_gradient[(triton.cdiv(tokens, ROWS),)](
            g.contiguous(), logits, experts, out, tokens, logits.shape[1], k, over_all, ROWS,
            triton.next_power_of_2(logits.shape[1]),
        )  # fmt: skip
    return out


def count_experts(counts: Tensor, experts: Tensor, real: Tensor | None) -> None:
    """See `model.routing.count_experts`. Sums of whole numbers by atomics are the same in every order."""
    tokens, k = experts.shape
    if tokens:
        given = counts if real is None else real.contiguous()
        _count[(triton.cdiv(tokens, 4 * ROWS),)](
            counts, experts.contiguous(), given, tokens, len(counts), k, real is not None, 4 * ROWS,
            triton.next_power_of_2(len(counts)),
        )  # fmt: skip


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def _softmax(value, among):
    """Along the experts, of those in `among`; 0 elsewhere."""
    value = tl.where(among, value, float("-inf"))
    value = tl.exp(value - tl.reduce(value, 1, _larger)[:, None])
    return value / tl.reduce(value, 1, _plus)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _route(logits, weights, chosen, tokens, experts, K: tl.constexpr, OVER_ALL: tl.constexpr, ROWS: tl.constexpr,
           E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E)[None, :]
    real = (row < tokens)[:, None] & (e < experts)
    value = tl.load(logits + row.to(tl.int64)[:, None] * experts + e, mask=real, other=0.0)
    key = tl.where(value == value, value, float("inf"))
    left = (e < experts) & (key == key)  # all, of this shape
    taken = left & (e < 0)
    for _ in range(K):
        most = tl.reduce(tl.where(left, key, float("-inf")), 1, _larger)[:, None]
        first = tl.reduce(tl.where(left & (key == most), e, E), 1, _smaller)[:, None]
        taken = taken | (e == first)
        left = left & (e != first)
    if OVER_ALL:
        share = _softmax(value, left | taken)
    else:
        share = _softmax(value, taken)
    rank = tl.associative_scan(taken.to(tl.int32), 1, _plus) - 1
    for j in range(K):
        here = taken & (rank == j)
        at = row * K + j
        tl.store(chosen + at, tl.reduce(tl.where(here, e, 0), 1, _plus), mask=row < tokens)
        tl.store(weights + at, tl.reduce(tl.where(here, share, 0.0), 1, _plus), mask=row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _route_gradient(g, logits, chosen, out, tokens, experts, K: tl.constexpr, OVER_ALL: tl.constexpr,
                    ROWS: tl.constexpr, E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E)[None, :]
    real = (row < tokens)[:, None] & (e < experts)
    at = row.to(tl.int64)[:, None] * experts + e
    value = tl.load(logits + at, mask=real, other=0.0)
    taken = (value == value) & (e < 0)
    spread = tl.full((ROWS, E), 0.0, tl.float32)
    for j in range(K):
        here = e == tl.load(chosen + row * K + j, mask=row < tokens, other=0)[:, None]
        spread = tl.where(here, tl.load(g + row * K + j, mask=row < tokens, other=0.0)[:, None], spread)
        taken = taken | here
    if OVER_ALL:
        share = _softmax(value, e < experts)
    else:
        share = _softmax(value, taken)
    inner = tl.reduce(share * spread, 1, _plus)[:, None]
    tl.store(out + at, share * (spread - inner), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _count(counts, chosen, real, tokens, experts, K: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
           E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counted = row < tokens
    if MASKED:
        counted = counted & (tl.load(real + row, mask=counted, other=0) != 0)
    e = tl.arange(0, E)
    total = tl.full((E,), 0, tl.int32)
    for j in range(K):
        one = tl.load(chosen + row * K + j, mask=counted, other=-1)
        total += tl.reduce((one[:, None] == e[None, :]).to(tl.int32), 0, _plus)
    tl.atomic_add(counts + e, total.to(tl.int64), mask=(e < experts) & (total > 0))
