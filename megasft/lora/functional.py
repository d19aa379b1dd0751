"""The two products that adapted layers consist of: one linear layer, and one linear layer per expert.

    y = x W^T + s drop(x) A^T B^T         (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685)

W is frozen. It is dense or in 4 bits; a 4-bit W is dequantized for each product, in forward and in backward, and then
discarded. Layers with the same input (q, k, v; gate, up) are fused: their W are stacked along the outputs and their A
along the rank, so that each product over the input is one GEMM. B stays block diagonal: output columns `columns[n]`
belong to B_n, which reads rank columns [n r, (n + 1) r).

Autograd would save drop(x) and add gradients in separate passes. These functions save x and h = drop(x) A^T, drop the
same elements again in backward, and where possible add to the frozen branch's result inside the GEMM.

T tokens, K inputs, N outputs, R = rank x number of stacked adapters, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megasft.lora import factors, recompute
from megasft.lora.dropout import Dropout
from megasft.lora.factors import Columns, grouped_mm
from megasft.quant.weight import QuantizedWeight

Weight = Tensor | QuantizedWeight


def lora_linear(x: Tensor, weight: Weight, A: Tensor, B: Sequence[Tensor], columns: Columns, scaling: float,
                drop: Dropout | None = None, unread: bool = False) -> Tensor:  # fmt: skip
    """x [T, K], frozen weight [N, K], A [R, K] and B_n [len(columns[n]), r] -> y [T, N].

    The adapters see drop(x). `scaling` includes its 1 / (1 - p). `unread`: only the gradients are wanted, not y (see
    `lora.recompute`).
    """
    return _LoraLinear.apply(x, weight, A, scaling, drop, columns, None, unread, *B)


def grouped_lora_linear(x: Tensor, weight: Weight, A: Tensor, B: Sequence[Tensor], columns: Columns, scaling: float,
                        offsets: Tensor, drop: Dropout | None = None, unread: bool = False) -> Tensor:  # fmt: skip
    """`lora_linear` for rows sorted by expert: x [T, K], weight [E, N, K], A [E, R, K], B_n [E, len(columns[n]), r].

    Rows offsets[e - 1] to offsets[e] (int32 [E]) belong to expert e.
    """
    return _LoraLinear.apply(x, weight, A, scaling, drop, columns, offsets, unread, *B)


def frozen_linear(x: Tensor, weight: Weight, unread: bool = False) -> Tensor:
    """x [T, K] times the transposed weight [N, K] -> [T, N], without a gradient for the weight."""
    return _FrozenLinear.apply(x, weight, None, unread)


def grouped_linear(x: Tensor, weight: Weight, offsets: Tensor, unread: bool = False) -> Tensor:
    """`frozen_linear` for rows sorted by expert and weight [E, N, K]."""
    return _FrozenLinear.apply(x, weight, offsets, unread)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, offsets: Tensor | None, unread: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight = weight
        if unread:
            return recompute.unread(x, len(x), weight.shape[-2])
        return _frozen(x, weight, offsets, transposed=True)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (offsets,) = ctx.saved_tensors
        return _frozen(gy if offsets is None else gy.contiguous(), ctx.weight, offsets), None, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        A: Tensor,
        scaling: float,
        drop: Dropout | None,
        columns: Columns,
        offsets: Tensor | None,
        unread: bool,
        *B: Tensor,
    ) -> Tensor:
        h = factors.down(x, A, scaling, drop, offsets)
        if unread:
            y = recompute.unread(x, len(x), weight.shape[-2])
        else:
            y = _frozen(x, weight, offsets, transposed=True)
            factors.add_up(y, h, B, columns, offsets)
        ctx.save_for_backward(x, A, h, offsets, *B)
        ctx.weight, ctx.scaling, ctx.drop, ctx.columns = weight, scaling, drop, columns
        ctx.into = _sums((A, *B)) if x.is_cuda else None
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, A, h, offsets, *B = ctx.saved_tensors
        gy = gy.contiguous()
        into_A, into_B = ctx.into or (None, None)
        # Those of B: h includes the scaling.
        gh, gB = factors.up_gradients(gy, h, B, ctx.columns, ctx.scaling, offsets, into_B)
        gx = _frozen(gy, ctx.weight, offsets) if ctx.needs_input_grad[0] else None
        gA = factors.down_gradients(gx, gh, x, A, ctx.drop, offsets, into_A)
        return gx, None, gA, None, None, None, None, None, *gB


def _sums(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
    """Where megatron-core adds up the gradients of A and each B over micro batches, fp32; None: outside of its DDP."""
    found = [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    return (found[0], found[1:]) if len(found) == len(parameters) else None


def _frozen(x: Tensor, weight: Weight, offsets: Tensor | None, transposed: bool = False) -> Tensor:
    """x times the frozen weight, or its transpose."""
    if offsets is not None:
        return _grouped(x, weight, offsets, transposed)
    return x @ (_dense(weight).t() if transposed else _dense(weight))


def _dense(weight: Weight) -> Tensor:
    """The weight [N, K]. A dequantized one is in the shared workspace: use it before the next is dequantized."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()[0]


def _grouped(x: Tensor, weight: Weight, offsets: Tensor, transposed: bool = False) -> Tensor:
    """x [T, .] times the weight [E, N, K] of each row's expert. A quantized weight is dequantized at once where
    `experts_at_once` allows it; elsewhere that many experts at a time, only those that have rows.
    """
    experts, n, k = weight.shape
    if isinstance(weight, QuantizedWeight) and x.shape[0] and weight.at_once >= experts:
        weight = weight.dequantize(0, experts)
    if isinstance(weight, Tensor):
        return grouped_mm(x, weight.transpose(-2, -1) if transposed else weight, offsets)
    y = x.new_empty(x.shape[0], n if transposed else k)
    if not x.shape[0]:
        return y
    ends = offsets.tolist()
    for first, last in weight.runs(ends):
        start = ends[first - 1] if first else 0
        rows, dense = slice(start, ends[last - 1]), weight.dequantize(first, last)
        dense = dense.transpose(-2, -1) if transposed else dense
        if last - first == 1:
            torch.mm(x[rows], dense[0], out=y[rows])
        else:
            y[rows] = grouped_mm(x[rows], dense, offsets[first:last] - start)
    return y
