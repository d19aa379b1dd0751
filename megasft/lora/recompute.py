"""Activation checkpointing: what a layer that is computed again for its backward need not compute.

Nothing reads the values that such a layer returns: megatron-core's `CheckpointFunction.backward` hands them to
autograd, which only follows how they came about. So the last functions, whose backward needs no value of theirs, are
not computed: the last product, the sum of the copies, its reduce-scatter and the residual sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward is repeated for its backward."""
    return is_checkpointing() and torch.is_grad_enabled()


def unread(like: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape that nothing reads, in the memory of one element."""
    return like.new_empty(()).expand(shape)


class Unread(torch.autograd.Function):
    """A linear function of x whose result of this shape nothing reads. `transpose` is its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], transpose: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.transpose = transpose
        return unread(x, *shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transpose(g), None, None


class UnreadSum(torch.autograd.Function):
    """x + y, of one shape, which nothing reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return unread(x, *x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return g, g
