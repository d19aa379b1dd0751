"""SwiGLU and its gradients in Triton, for CUDA: one pass each, in fp32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WIDE = 16, 128  # of a tile


def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    """See `megasft.model.swiglu`: gate_up [T, 2F], weight [T] or None -> [T, F]."""
    gate_up, (rows, width) = gate_up.contiguous(), (len(gate_up), gate_up.shape[1] // 2)
    y = gate_up.new_empty(rows, width)
    if y.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, WIDE))
        _forward[grid](gate_up, _any(weight, gate_up), y, rows, width, weight is not None, ROWS, WIDE)
    return y


def gradients(gy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `megasft.model.swiglu`: the gradients of gate_up [T, 2F] and of weight [T], empty if that is None."""
    gy, gate_up, (rows, width) = gy.contiguous(), gate_up.contiguous(), gy.shape
    g = torch.empty_like(gate_up)
    g_weight = gy.new_empty(0) if weight is None else weight.new_zeros(rows)
    if gy.numel():
        _backward[(triton.cdiv(rows, ROWS),)](
            gy, gate_up, _any(weight, gy), g, _any(None if weight is None else g_weight, gy), rows, width,
            weight is not None, ROWS, WIDE,
        )  # fmt: skip
    return g, g_weight


def _any(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _forward(gate_up, weight, y, rows, width, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width
    gate = tl.load(gate_up + 2 * at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * at + width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        value *= tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit(do_not_specialize=["rows"])
def _backward(gy, gate_up, weight, g, g_weight, rows, width, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * width
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        scale = tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    for first in range(0, width, WIDE):
        column = first + tl.arange(0, WIDE)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        gate = tl.load(gate_up + 2 * at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + 2 * at + width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        above = tl.load(gy + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        total += tl.reduce(above * silu * up, 1, _plus)
        above *= scale[:, None]
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(g + 2 * at + column[None, :], (above * up * slope).to(g.dtype.element_ty), mask=inside)
        tl.store(g + 2 * at + width + column[None, :], (above * silu).to(g.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(g_weight + row, total.to(g_weight.dtype.element_ty), mask=row < rows)
