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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megasft.quant.weight import QuantizedWeight

Columns = Sequence[slice]
Weight = Tensor | QuantizedWeight
Drop = Callable[[Tensor], Tensor]  # `lora.dropout.Dropout`: zeroes the same elements whenever it is called


def lora_linear(x: Tensor, weight: Weight, A: Tensor, B: Sequence[Tensor], columns: Columns, scaling: float,
                drop: Drop | None = None) -> Tensor:  # fmt: skip
    """x [T, K], frozen weight [N, K], A [R, K] and B_n [len(columns[n]), r] -> y [T, N].

    The adapters see drop(x). `scaling` includes its 1 / (1 - p).
    """
    return _LoraLinear.apply(x, weight, A, scaling, drop, columns, *B)


def grouped_lora_linear(x: Tensor, weight: Weight, A: Tensor, B: Sequence[Tensor], columns: Columns, scaling: float,
                        offsets: Tensor, drop: Drop | None = None) -> Tensor:  # fmt: skip
    """`lora_linear` for rows sorted by expert: x [T, K], weight [E, N, K], A [E, R, K], B_n [E, len(columns[n]), r].

    Rows offsets[e - 1] to offsets[e] (int32 [E]) belong to expert e.
    """
    return _GroupedLoraLinear.apply(x, weight, A, scaling, drop, columns, offsets, *B)


def frozen_linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] times the transposed weight [N, K] -> [T, N], without a gradient for the weight."""
    return _FrozenLinear.apply(x, weight)


def grouped_linear(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """`frozen_linear` for rows sorted by expert and weight [E, N, K]."""
    return _GroupedLinear.apply(x, weight, offsets)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x @ _dense(weight).t()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return gy @ _dense(ctx.weight), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight = weight
        return _grouped(x, weight, offsets, transposed=True)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _grouped(gy.contiguous(), ctx.weight, *ctx.saved_tensors), None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        A: Tensor,
        scaling: float,
        drop: Drop | None,
        columns: Columns,
        *B: Tensor,
    ) -> Tensor:
        h = (x if drop is None else drop(x)) @ A.t()
        y = x @ _dense(weight).t()
        for n, (at, b) in enumerate(zip(columns, B, strict=True)):
            y[:, at].addmm_(h[:, _block(n, b)], b.t(), alpha=scaling)
        ctx.save_for_backward(x, A, h, *B)
        ctx.weight, ctx.scaling, ctx.drop, ctx.columns = weight, scaling, drop, columns
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, A, h, *B = ctx.saved_tensors
        drop = ctx.drop
        gh = torch.empty_like(h)
        gB = []
        for n, (at, b) in enumerate(zip(ctx.columns, B, strict=True)):
            gh[:, _block(n, b)] = gy[:, at] @ b
            gB.append((gy[:, at].t() @ h[:, _block(n, b)]).mul_(ctx.scaling))
        gh *= ctx.scaling
        gA = gh.t() @ (x if drop is None else drop(x))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = gy @ _dense(ctx.weight)
            if drop is None:
                gx.addmm_(gh, A)
            else:
                gx += drop(gh @ A)
        return gx, None, gA, None, None, None, *gB


class _GroupedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        A: Tensor,
        scaling: float,
        drop: Drop | None,
        columns: Columns,
        offsets: Tensor,
        *B: Tensor,
    ) -> Tensor:
        h = grouped_mm(x if drop is None else drop(x), A.transpose(-2, -1), offsets).mul_(scaling)
        y = _grouped(x, weight, offsets, transposed=True)
        for n, (at, b) in enumerate(zip(columns, B, strict=True)):
            y[:, at].add_(grouped_mm(h[:, _block(n, b)], b.transpose(-2, -1), offsets))
        ctx.save_for_backward(x, A, h, offsets, *B)
        ctx.weight, ctx.scaling, ctx.drop, ctx.columns = weight, scaling, drop, columns
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, A, h, offsets, *B = ctx.saved_tensors
        drop = ctx.drop
        gy = gy.contiguous()
        gh = torch.empty_like(h)
        gB = []
        for n, (at, b) in enumerate(zip(ctx.columns, B, strict=True)):
            gh[:, _block(n, b)] = grouped_mm(gy[:, at], b, offsets)
            gB.append(grouped_mm(gy[:, at].t(), h[:, _block(n, b)], offsets))  # h includes the scaling
        gh *= ctx.scaling
        gA = grouped_mm(gh.t(), x if drop is None else drop(x), offsets)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = _grouped(gy, ctx.weight, offsets)
            gx_lora = grouped_mm(gh, A, offsets)
            gx += gx_lora if drop is None else drop(gx_lora)
        return gx, None, gA, None, None, None, None, *gB


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


def _block(n: int, b: Tensor) -> slice:
    """The rank columns of the n-th stacked adapter."""
    r = b.shape[-1]
    return slice(n * r, (n + 1) * r)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm`, or a loop over the groups for strides that its kernels do not support.

    Either a [T, K] with groups of rows and b [E, K, N] -> [T, N]; or a [M, T] and b [T, N] with groups along T ->
    [E, M, N]. Groups may be empty. Where all are, no kernel runs: those of CUDA describe a matrix by its rows.
    """
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[-1]) if b.dim() == 3 else a.new_zeros(len(offsets), len(a), b.shape[1])
    if _aligned(a) and _aligned(b):
        return torch.nn.functional.grouped_mm(a, b, offs=offsets)
    ends = offsets.tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for e, span in enumerate(spans):
            torch.mm(a[span], b[e], out=out[span])
        return out
    return torch.stack([a[:, span] @ b[span] for span in spans])


def _aligned(tensor: Tensor) -> bool:
    # The grouped kernels load 16 bytes at a time; torch 2.13 refuses unaligned strides and start addresses.
    size = tensor.element_size()
    strides = [step * size for step in tensor.stride() if step != 1]
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in strides)
