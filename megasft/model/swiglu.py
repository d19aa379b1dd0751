"""SwiGLU, by torch on CPUs and by one Triton kernel on CUDA."""

from typing import Any

import torch
from torch import Tensor, nn


def swiglu(gate_up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up * weight (Shazeer 2020, arXiv:2002.05202): gate_up [..., 2F], weight [...] -> [..., F]."""
    return _SwiGLU.apply(gate_up, weight)


class _SwiGLU(torch.autograd.Function):
    """Saves only gate_up and weight; backward recomputes silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        if gate_up.is_cuda:
            flat = None if weight is None else weight.flatten()
            y = torch.ops.megasft.swiglu(gate_up.flatten(0, -2), flat)
            return y.view(*gate_up.shape[:-1], y.shape[-1])
        gate, up = gate_up.chunk(2, dim=-1)
        y = nn.functional.silu(gate).mul_(up)
        return y if weight is None else y.mul_(weight.to(y.dtype)[..., None])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        gate_up, weight = ctx.saved_tensors
        if gate_up.is_cuda:
            flat = None if weight is None else weight.flatten()
            g, g_weight = torch.ops.megasft.swiglu_gradients(gy.flatten(0, -2), gate_up.flatten(0, -2), flat)
            return g.view_as(gate_up), None if weight is None else g_weight.view_as(weight)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = nn.functional.silu(gate)
        g_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                g_weight = (gy * activated).mul_(up).sum(-1, dtype=weight.dtype)
            gy = gy * weight.to(gy.dtype)[..., None]
        g = torch.empty_like(gate_up)
        g_gate, g_up = g.chunk(2, dim=-1)
        torch.mul(gy, activated, out=g_up)
        g_gate.copy_(torch.ops.aten.silu_backward(gy * up, gate))
        return g, g_weight


def _forward_on_cuda(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    from megasft.kernels import swiglu as kernels  # imports Triton, which comes with torch's CUDA builds

    return kernels.swiglu(gate_up, weight)


def _gradients_on_cuda(gy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    from megasft.kernels import swiglu as kernels

    return kernels.gradients(gy, gate_up, weight)


def _shapes(gy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), gy.new_empty(0) if weight is None else torch.empty_like(weight)


_library = torch.library.Library("megasft", "FRAGMENT")
_library.define("swiglu(Tensor gate_up, Tensor? weight) -> Tensor")
_library.define("swiglu_gradients(Tensor gy, Tensor gate_up, Tensor? weight) -> (Tensor, Tensor)")
_library.impl("swiglu", _forward_on_cuda, "CUDA")
_library.impl("swiglu", lambda gate_up, _: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2), "Meta")
_library.impl("swiglu_gradients", _gradients_on_cuda, "CUDA")
_library.impl("swiglu_gradients", _shapes, "Meta")
