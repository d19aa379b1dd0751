"""megatron-core's token dispatchers, fed with each token's k choices instead of masks over all experts.

megatron-core 0.19.2 sends and sorts masks of tokens x experts, sums the copies of a token by `scatter_add_`, on GPUs
with atomics in the dtype of the model and in no fixed order, and asks the device several times in each layer for
numbers that the host knows or does not need. Here choices are sent, and copies are made and summed by `model.copies`.
The all-to-all's collectives are megatron-core's.

S: tokens of this rank's sequence shard; T: of all ranks that share the experts; k: choices of each; n: rows of this
rank's experts, one for each choice of them; H: hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor

from megasft.lora.dropout import JoinPlaces, SplitPlaces
from megasft.lora.linear import scattered
from megasft.lora.recompute import recomputing
from megasft.model.copies import Copies

Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What the experts compute: rows [n, H] sorted by expert, where each expert's end, int32 [experts], routing weights
fp32 [n], and numbers that tell the rows of all experts apart, int64 [n], or None."""


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank that shares the experts gathers all tokens. Waits for the device only where the number of copies is
    not known: with experts on other ranks, and with a capacity.

    places: int64 [S], of this rank's tokens in the global batch, or None.
    """

    places: Tensor | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [S, 1, H], experts int32 [S, k] and their weights fp32 [S, k] -> [S, H], weights."""
        self.hidden_shape, self._chosen, self._places = hidden_states.shape, chosen, self.places
        return hidden_states.view(-1, hidden_states.shape[-1]), weights

    def token_dispatch(self, hidden_states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """[S, H] and [S, k] -> [T, H] and [T, k]."""
        if self._shares:
            gathered = _GatherChoices.apply(weights, self._chosen, self._places, self.tp_ep_group)
            weights, self._chosen, self._places = gathered
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=self.tp_ep_group, use_global_buffer=True
            )
        return hidden_states, weights

    def dispatch_postprocess(self, hidden_states: Tensor, weights: Tensor) -> Rows:  # type: ignore[override]
        """[T, H] and [T, k] -> the rows of this rank's experts."""
        here, experts = _range(self.local_expert_indices), self.config.num_moe_experts
        chosen = self._chosen
        if self.ep_size == 1 and self.config.moe_expert_capacity_factor is None:
            n = chosen.numel()
        else:
            n = int(((chosen >= here.start) & (chosen < here.stop)).sum())
        self.copies = Copies.of(chosen, here, n, experts, self._places)
        counters = None if self._places is None else self.copies.counters
        return self.copies.make(hidden_states), self.copies.ends, self.copies.pick(weights), counters

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Experts' outputs [n, H] -> [T, H]."""
        return self.copies.add_up(hidden_states, self.skips)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> the sum over the ranks, [S, H], in the dtype of the model as of every row-parallel layer."""
        if not self._shares:
            return hidden_states
        return scattered(hidden_states, self.tp_ep_group, self.skips)

    @property
    def skips(self) -> bool:
        """Whether the experts' outputs are not wanted (see `lora.recompute`)."""
        return recomputing()

    @property
    def _shares(self) -> bool:
        return self.tp_size > 1 or self.ep_size > 1


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends each token to the ranks of its experts. Waits once for the device, for the numbers that it sends and
    receives; without other ranks not at all, unless there is a capacity.

    places: int64 [S], of this rank's tokens in the global batch, or None. They travel with the routing weights.
    """

    places: Tensor | None = None
    tokens_per_expert: Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the experts' outputs are not wanted (see `lora.recompute`); those that travel are computed anyway."""
        return self._alone and recomputing()

    @property
    def _alone(self) -> bool:
        return self.ep_size == self.tp_size == 1

    def dispatch_preprocess(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [S, 1, H], experts int32 [S, k] and their weights fp32 [S, k] -> copies of the tokens and their
        weights, sorted by expert of all ranks.
        """
        self.hidden_shape, places = hidden_states.shape, None
        self.probs = hidden_states.new_empty(0)  # megatron-core sums the experts' outputs in its dtype
        if self._alone:
            places, known = self.places, self.config.moe_expert_capacity_factor is None
            n = chosen.numel() if known else int((chosen < self.num_experts).sum())
        else:
            mask = chosen.new_zeros(len(chosen), self.num_experts + 1, dtype=torch.bool)
            counts = self.preprocess(mask.scatter_(1, chosen.long(), True)[:, : self.num_experts])
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
            n = int(self.num_out_tokens)
            if self.places is not None:
                weights = JoinPlaces.apply(weights, self.places)
        self.copies = Copies.of(chosen, range(self.num_experts), n, self.num_experts, places)
        return self.copies.make(hidden_states.view(-1, self.hidden_shape[-1])), self.copies.pick(weights)

    def dispatch_postprocess(self, hidden_states: Tensor, weights: Tensor) -> Rows:  # type: ignore[override]
        """What has arrived -> sorted by expert of this rank; what never left is."""
        if self._alone:
            return hidden_states, self.copies.ends, weights, None if self.places is None else self.copies.counters
        rows, counts, weights = super().dispatch_postprocess(hidden_states, weights)
        ends, counters = counts.cumsum(0, dtype=torch.int32), None
        if self.places is not None:
            weights, places = SplitPlaces.apply(weights)
            number = torch.arange(len(places), dtype=ends.dtype, device=places.device)
            expert = torch.searchsorted(ends, number, right=True) + self.local_expert_indices[0]
            counters = places * self.num_experts + expert
        return rows, ends, weights, counters

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The reverse of `dispatch_postprocess`."""
        return hidden_states if self._alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Copies that came back [copies, H] -> hidden states [S, 1, H]."""
        return self.copies.add_up(permutated_local_input_tokens, self.skips).view(self.hidden_shape)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """Copy to the host what it needs there; the grouped products read the counts of the experts on the device."""
        if not self._alone:
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert


class _GatherChoices(torch.autograd.Function):
    """Weights fp32 [S, k], experts int32 [S, k] and places int64 [S] or None: of all ranks of a group, in one."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, chosen: Tensor, places: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.group, k = group, weights.shape[1]
        parts = [chosen, weights.view(torch.int32)]
        if places is not None:
            parts.append(places[:, None].view(torch.int32))
        gathered = gather_from_sequence_parallel_region(torch.cat(parts, dim=1), group=group)
        chosen, all_weights = gathered[:, :k], gathered[:, k : 2 * k].view(torch.float32)
        if places is not None:
            places = gathered[:, 2 * k :].view(torch.int64)[:, 0]
            ctx.mark_non_differentiable(chosen, places)
        else:
            ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)  # no zeros for whole numbers
        return all_weights, chosen, places

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return reduce_scatter_to_sequence_parallel_region(g.contiguous(), group=ctx.group), None, None, None


def _range(experts: list[int]) -> range:
    return range(experts[0], experts[-1] + 1)


DISPATCHERS = {"allgather": AllGatherDispatcher, "alltoall": AllToAllDispatcher}
