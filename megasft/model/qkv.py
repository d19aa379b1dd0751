"""Queries, keys and values out of one product: norm of each head, rotary positions. By torch on CPUs, else one kernel.

T tokens; h, g: query and key/value heads on this rank; d: head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from megasft.model.norm import RMSNorm


def split_qkv(
    qkv: Tensor, heads: int, q_norm: RMSNorm, k_norm: RMSNorm, cos_sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (h + 2 g) d], cos_sin [2, T, d] -> q [T, h, d], k and v [T, g, d]; q and k normed by head and rotated."""
    if qkv.is_cuda:
        return _SplitOnCuda.apply(qkv, heads, q_norm.weight, k_norm.weight, cos_sin, q_norm.eps)
    q, k, v = (one.unflatten(-1, (-1, cos_sin.shape[-1])) for one in _parts(qkv, heads, cos_sin.shape[-1]))
    return rotate(q_norm(q), cos_sin), rotate(k_norm(k), cos_sin), v


def _parts(qkv: Tensor, heads: int, d: int) -> tuple[Tensor, ...]:
    groups = (qkv.shape[-1] // d - heads) // 2
    return qkv.split([heads * d, groups * d, groups * d], dim=-1)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotating the two halves as Qwen3 does.

    x [T, heads, d], cos_sin [2, T, d], whose halves are equal.
    """
    return _Rotate.apply(x, cos_sin)


class _Rotate(torch.autograd.Function):
    """Linear in x, so backward needs only cos and sin. The transpose of a rotation is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin)
        return _turn(x, cos_sin[0, :, None], cos_sin[1, :, None])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (cos_sin,) = ctx.saved_tensors
        # cos and sin repeat in both halves, so the transpose only changes the sign of sin.
        return _turn(gy, cos_sin[0, :, None], -cos_sin[1, :, None]), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _SplitOnCuda(torch.autograd.Function):
    """Saves qkv; backward norms its heads again, and writes the gradients where qkv's parts lie."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv, q_weight, k_weight, cos_sin)
        ctx.eps = eps
        return torch.ops.megasft.split_qkv(qkv, heads, q_weight, k_weight, cos_sin, eps)

    @staticmethod
    def backward(ctx: Any, gq: Tensor, gk: Tensor, gv: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        g = torch.ops.megasft.split_qkv_gradient(gq, gk, gv, *ctx.saved_tensors, ctx.eps)
        return g, None, None, None, None, None


def _split_on_cuda(*args: Any) -> Any:
    from megasft.kernels import qkv as kernels  # imports Triton, which comes with torch's CUDA builds

    return kernels.split(*args)


def _gradient_on_cuda(*args: Any) -> Any:
    from megasft.kernels import qkv as kernels

    return kernels.gradient(*args)


def _shapes(qkv: Tensor, heads: int, q_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    d = len(q_weight)
    groups = (qkv.shape[-1] // d - heads) // 2
    return tuple(qkv.new_empty(len(qkv), n, d) for n in (heads, groups, groups))


_NORMS = "Tensor q_weight, Tensor k_weight, Tensor cos_sin, float eps"
_library = torch.library.Library("megasft", "FRAGMENT")
_library.define(f"split_qkv(Tensor qkv, int heads, {_NORMS}) -> (Tensor, Tensor, Tensor)")
_library.define(f"split_qkv_gradient(Tensor gq, Tensor gk, Tensor gv, Tensor qkv, {_NORMS}) -> Tensor")
_library.impl("split_qkv", _split_on_cuda, "CUDA")
_library.impl("split_qkv", _shapes, "Meta")
_library.impl("split_qkv_gradient", _gradient_on_cuda, "CUDA")
_library.impl("split_qkv_gradient", lambda gq, gk, gv, qkv, *_: torch.empty_like(qkv), "Meta")
