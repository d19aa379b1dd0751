"""Copies of tokens for the experts that they chose: made, weighed and summed, without atomics.

By torch on CPUs, by Triton on CUDA. T: tokens, each with k choices; E: experts on this rank; n: copies, one for each
choice of one of these experts; H: hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasft.lora.recompute import Unread


@dataclass(frozen=True)
class Copies:
    """Copies of tokens, sorted by expert and within an expert by token.

    Attributes:
        tokens: int32 [n], the token of each copy.
        slots: int32 [T, k], the copy of each choice; -1: the expert is of another rank, or the choice was dropped.
        ends: int32 [E], where each expert's copies end.
        counters: int64 [n], the place of the copy's token x experts of the full layer + the copy's expert; empty where
            no places are given.
    """

    tokens: Tensor
    slots: Tensor
    ends: Tensor
    counters: Tensor

    @classmethod
    def of(cls, chosen: Tensor, here: range, copies: int, experts: int, places: Tensor | None = None) -> "Copies":
        """Of the choices, int32 [T, k], of `experts` of the full layer, `copies` are of this rank's `here`.

        places: int64 [T], of each token in the global batch. The choices of a token ascend, but for dropped ones, which
        are `experts`.
        """
        return cls(*torch.ops.megasft.sort_copies(chosen, places, here.start, len(here), experts, copies))

    def make(self, x: Tensor) -> Tensor:
        """The copies of tokens: x [T, H] -> [n, H]."""
        return _Linear.apply(x, self._gathered, self._summed)

    def add_up(self, y: Tensor, unread: bool = False) -> Tensor:
        """The sum of each token's copies in fp32, in the order of its choices, rounded once: y [n, H] -> [T, H].

        `unread`: the values are not wanted (see `lora.recompute`).
        """
        if unread:
            return Unread.apply(y, (len(self.slots), y.shape[1]), self._gathered)
        return _Linear.apply(y, self._summed, self._gathered)

    def pick(self, weights: Tensor) -> Tensor:
        """What belongs to the copies: [T, k] -> [n]."""
        return _Linear.apply(weights, self._picked, self._returned)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tokens)

    def _summed(self, y: Tensor) -> Tensor:
        return torch.ops.megasft.sum_copies(y, self.slots)

    def _picked(self, weights: Tensor) -> Tensor:
        return torch.ops.megasft.to_copies(weights, self.slots, len(self.tokens))

    def _returned(self, grad: Tensor) -> Tensor:
        return torch.ops.megasft.from_copies(grad, self.slots)


class _Linear(torch.autograd.Function):
    """A linear function with its transpose for backward, neither of which needs a tensor of the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = transpose
        return function(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transpose(gy), None, None


# --- operators --------------------------------------------------------------------------------------------------------


def _sort_copies(
    chosen: Tensor, places: Tensor | None, first: int, local: int, experts: int, copies: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert = chosen.reshape(-1) - first
    expert = torch.where((expert >= 0) & (expert < local), expert, local)
    order = expert.argsort(stable=True)[:copies]
    tokens = order // chosen.shape[1]
    slots = torch.full_like(expert, -1)
    slots[order] = torch.arange(copies, dtype=torch.int32)
    ends = torch.bincount(expert, minlength=local + 1)[:local].cumsum(0, dtype=torch.int32)
    counters = expert.new_empty(0, dtype=torch.int64)
    if places is not None:
        counters = places[tokens] * experts + expert[order] + first
    return tokens.int(), slots.view(chosen.shape), ends, counters


def _sum_copies(y: Tensor, slots: Tensor) -> Tensor:
    y = y.detach().contiguous()
    if len(y) == slots.numel():
        return torch.nn.functional.embedding_bag(slots, y, mode="sum")
    there = slots >= 0
    counts = there.sum(1, dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    return torch.nn.functional.embedding_bag(slots[there], y, starts, mode="sum")


def _to_copies(values: Tensor, slots: Tensor, copies: int) -> Tensor:
    there = slots >= 0
    return values.new_empty(copies).index_copy_(0, slots[there].long(), values[there])


def _from_copies(values: Tensor, slots: Tensor) -> Tensor:
    there = slots >= 0
    out = values.new_zeros(slots.shape)
    out[there] = values[slots[there]]
    return out


def _sort_shapes(
    chosen: Tensor, places: Tensor | None, first: int, local: int, experts: int, copies: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counters = chosen.new_empty(0 if places is None else copies, dtype=torch.int64)
    return chosen.new_empty(copies), chosen.new_empty(chosen.shape), chosen.new_empty(local), counters


def _kernel(name: str) -> Any:
    def call(*args: Any) -> Any:
        from megasft.kernels import copies as kernels  # imports Triton, which comes with torch's CUDA builds

        return getattr(kernels, name)(*args)

    return call


_OPERATORS: dict[str, tuple[str, Any, Any]] = {  # what each takes and gives, on CPUs, and its shape
    "sort_copies": (
        "(Tensor chosen, Tensor? places, int first, int local, int experts, int copies)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _sort_copies,
        _sort_shapes,
    ),
    "sum_copies": (
        "(Tensor y, Tensor slots) -> Tensor",
        _sum_copies,
        lambda y, slots: y.new_empty(len(slots), y.shape[1]),
    ),
    "to_copies": (
        "(Tensor values, Tensor slots, int copies) -> Tensor",
        _to_copies,
        lambda values, _, copies: values.new_empty(copies),
    ),
    "from_copies": (
        "(Tensor values, Tensor slots) -> Tensor",
        _from_copies,
        lambda values, slots: values.new_empty(slots.shape),
    ),
}
_library = torch.library.Library("megasft", "FRAGMENT")
for _name, (_schema, _on_cpu, _shape) in _OPERATORS.items():
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _kernel(_name), "CUDA")
    _library.impl(_name, _shape, "Meta")
