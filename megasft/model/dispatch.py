"""megatron-core's token dispatchers, with copies made and summed without atomics and without waiting for the device.

megatron-core 0.19.2 sums the copies of a token by `scatter_add_`, on GPUs with atomics in the dtype of the model and in
no fixed order, sorts a mask of tokens x experts to make them, and asks the device several times in each layer for
numbers that the host knows or does not need. Collectives are megatron-core's.

T: tokens; E: experts on this rank; n: copies of tokens, one for each choice of one of these experts; H: hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Copies of tokens, sorted by expert and within an expert by token.

    Attributes:
        places: int64 [n], where in [E, T] flattened each copy was chosen.
        tokens: int64 [n], the token of each copy.
        order: int64 [n], the copies of the first token, then those of the second, ..., each by expert.
        starts: int64 [T], where in `order` the copies of each token start.
        experts: E.
    """

    places: Tensor
    tokens: Tensor
    order: Tensor
    starts: Tensor
    experts: int

    @classmethod
    def of(cls, chosen: Tensor, copies: int) -> "Copies":
        """`chosen`, bool [T, E], has `copies` true elements."""
        by_expert = chosen.t().contiguous()
        experts, tokens = by_expert.nonzero_static(size=copies).unbind(1)
        counts = chosen.sum(1)
        order = tokens.int().argsort(stable=True)  # 32 bits are sorted in half the passes of 64
        return cls(experts * len(chosen) + tokens, tokens, order, counts.cumsum(0) - counts, chosen.shape[1])

    def make(self, x: Tensor) -> Tensor:
        """The copies of tokens: x [T, H] -> [n, H]."""
        return _Linear.apply(x, self._gathered, self._summed)

    def add_up(self, y: Tensor) -> Tensor:
        """The sum of each token's copies, rounded once: y [n, H] -> [T, H]."""
        return _Linear.apply(y, self._summed, self._gathered)

    def pick(self, weights: Tensor) -> Tensor:
        """The routing weights of the copies: [T, E] -> [n]."""
        return _Linear.apply(weights, self._picked, self._spread)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tokens)

    def _summed(self, y: Tensor) -> Tensor:
        # One kernel that reads each copy once and adds in fp32, in the order of the experts.
        return torch.nn.functional.embedding_bag(self.order, y.detach().contiguous(), self.starts, mode="sum")

    def _picked(self, weights: Tensor) -> Tensor:
        return weights.t().reshape(-1).index_select(0, self.places)

    def _spread(self, grad: Tensor) -> Tensor:
        tokens = len(self.starts)
        spread = grad.new_zeros(self.experts * tokens).index_copy_(0, self.places, grad)
        return spread.view(self.experts, tokens).t()


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


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank that shares the experts gathers all tokens. Waits for the device only where the number of copies is
    not known: with experts on other ranks, and with a capacity.
    """

    routing_map: Any

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gathered tokens [T, H] and routing weights [T, experts] -> copies [n, H], how many an expert has, weights."""
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        chosen = self.routing_map[:, mine]
        known = self.ep_size == 1 and self.config.moe_expert_capacity_factor is None
        self.copies = Copies.of(chosen, len(chosen) * self.router_topk if known else int(chosen.sum()))
        self.routing_map = None
        self.local_probs = self.copies.pick(probs[:, mine])
        return self.copies.make(hidden_states), chosen.sum(0), self.local_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Experts' outputs [n, H] -> [T, H]."""
        return self.copies.add_up(hidden_states)


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends each token to the ranks of its experts. Waits once for the device, for the numbers that it sends and
    receives; without other ranks not at all, unless there is a capacity.
    """

    @property
    def _alone(self) -> bool:
        return self.ep_size == self.tp_size == 1

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [S, B, H] -> copies of the tokens and their weights, sorted by expert of all ranks."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.copies = Copies.of(routing_map, int(self.num_out_tokens))
        return self.copies.make(hidden_states.view(-1, self.hidden_shape[-1])), self.copies.pick(probs)

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies received [n, H] -> sorted by expert of this rank; those of one rank are."""
        if self._alone:
            return global_input_tokens, self.tokens_per_expert, global_probs
        return super().dispatch_postprocess(global_input_tokens, global_probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The reverse of `dispatch_postprocess`."""
        return hidden_states if self._alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Copies that came back [n, H] -> hidden states [S, B, H]."""
        return self.copies.add_up(permutated_local_input_tokens).view(self.hidden_shape)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """Copy to the host what it needs there; the grouped products read the counts of the experts on the device."""
        if not self._alone:
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert


DISPATCHERS = {"allgather": AllGatherDispatcher, "alltoall": AllToAllDispatcher}
