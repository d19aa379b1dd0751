"""Top-k softmax routing: which experts a token goes to, and with what weights. By torch on CPUs, by Triton on CUDA.

T tokens, E experts, k of them for each token.
"""

from typing import Any

import torch
from torch import Tensor


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """Logits in fp32 of values in any dtype, none of which is rounded: x [T, H], frozen weight [E, H] -> [T, E]."""
    return _Gate.apply(x, weight)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)  # tensor cores multiply exactly and add in fp32
        return x.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return (g @ weight.float()).to(ctx.dtype), None


def top_experts(logits: Tensor, k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    """logits fp32 [T, E] -> weights fp32 [T, k], experts int32 [T, k], those of a token in ascending order.

    The weights are a softmax over the k largest logits, or, if `over_all`, over all logits (Shazeer et al. 2017,
    arXiv:1701.06538, and Qwen3-MoE's norm_topk_prob).
    """
    return _Route.apply(logits, k, over_all)


def count_experts(counts: Tensor, experts: Tensor, real: Tensor | None) -> None:
    """Add to counts, int64 [E], how many tokens chose each expert: experts int32 [T, k]; what is no expert is left out.

    real: bool [T], the tokens that count; None: all.
    """
    torch.ops.megasft.count_experts(counts, experts, real)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, over_all: bool) -> tuple[Tensor, Tensor]:
        weights, experts = torch.ops.megasft.route(logits, k, over_all)
        ctx.save_for_backward(logits, experts)
        ctx.over_all = over_all
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)  # no zeros for the experts
        return weights, experts

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        return None if g is None else torch.ops.megasft.route_gradient(g, *ctx.saved_tensors, ctx.over_all), None, None


# --- operators --------------------------------------------------------------------------------------------------------


def _route(logits: Tensor, k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    top, experts = (logits.softmax(dim=-1) if over_all else logits).topk(k, dim=-1)
    weights = top if over_all else top.softmax(dim=-1)
    experts, order = experts.sort(dim=-1)
    return weights.gather(1, order), experts.int()


def _route_gradient(g: Tensor, logits: Tensor, experts: Tensor, over_all: bool) -> Tensor:
    at, spread = experts.long(), torch.zeros_like(logits)
    if over_all:
        p = logits.softmax(dim=-1)
        spread.scatter_(1, at, g)
        return p * (spread - (p * spread).sum(-1, keepdim=True))
    weights = logits.gather(1, at).softmax(dim=-1)
    return spread.scatter_(1, at, weights * (g - (weights * g).sum(-1, keepdim=True)))


def _count_experts(counts: Tensor, experts: Tensor, real: Tensor | None) -> None:
    chosen = (experts if real is None else experts[real]).flatten()
    counts += torch.bincount(chosen[chosen < len(counts)], minlength=len(counts))


def _kernel(name: str) -> Any:
    def call(*args: Any) -> Any:
        from megasft.kernels import routing as kernels  # imports Triton, which comes with torch's CUDA builds

        return getattr(kernels, name)(*args)

    return call


def _shapes(logits: Tensor, k: int, _: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), k), logits.new_empty(len(logits), k, dtype=torch.int32)


_library = torch.library.Library("megasft", "FRAGMENT")
_library.define("route(Tensor logits, int k, bool over_all) -> (Tensor, Tensor)")
_library.define("route_gradient(Tensor g, Tensor logits, Tensor experts, bool over_all) -> Tensor")
_library.define("count_experts(Tensor(a!) counts, Tensor experts, Tensor? real) -> ()")
_library.impl("route", _route, "CPU")
_library.impl("route", _kernel("route"), "CUDA")
_library.impl("route", _shapes, "Meta")
_library.impl("route_gradient", _route_gradient, "CPU")
_library.impl("route_gradient", _kernel("route_gradient"), "CUDA")
_library.impl("route_gradient", lambda g, logits, *_: torch.empty_like(logits), "Meta")
_library.impl("count_experts", _count_experts, "CPU")
_library.impl("count_experts", _kernel("count_experts"), "CUDA")
_library.impl("count_experts", lambda *_: None, "Meta")
