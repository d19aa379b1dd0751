"""Feed-forward layers: dense SwiGLU for `mlp_only_layers`, router and experts for the others.

T: tokens (in experts: token copies, one per chosen expert) on this rank; F: intermediate size; E: experts on this rank.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megasft import host
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.lora.grouped import GroupedLoraLinear
from megasft.lora.linear import LoraLinear
from megasft.lora.recompute import recomputing
from megasft.lora.sharded import ShardedLinear
from megasft.model.dispatch import DISPATCHERS
from megasft.model.routing import count_experts, gate, top_experts
from megasft.model.swiglu import swiglu
from megasft.storage.shards import Shard, Sharded


class DenseMLP(Sharded):
    """down(silu(gate x) * up x), split over the tensor-parallel ranks."""

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        lora: LoraSettings,
        quant: QuantSettings | None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.config = config
        h, f = config.hidden_size, config.ffn_hidden_size
        common = {"lora": lora, "group": pg_collection.tp, "dtype": config.params_dtype}
        common |= {"writer": pg_collection.dp.rank() == 0, "quant": quant}
        self.linear_fc1 = LoraLinear(h, {"gate_proj": f, "up_proj": f}, "column", **common)
        self.linear_fc2 = LoraLinear(f, {"down_proj": h}, "row", **common)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        """x [S, 1, H] -> [S, 1, H] and no bias."""
        return run_or_recompute(self, self._run, x)

    def _run(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear_fc2(swiglu(self.linear_fc1(x)), recomputing()), None

    def base_shards(self) -> Iterator[Shard]:
        yield from self.linear_fc1.base_shards()
        yield from self.linear_fc2.base_shards()

    def adapter_shards(self) -> Iterator[Shard]:
        yield from self.linear_fc1.adapter_shards()
        yield from self.linear_fc2.adapter_shards()


class SparseMLP(MoELayer, Sharded):
    """megatron-core's mixture-of-experts layer (dispatchers and top-k routing) with our router and experts."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        lora: LoraSettings,
        quant: QuantSettings | None,
        **kwargs: Any,
    ) -> None:
        def router(**given: Any) -> Router:
            return Router(**given, lora=lora)

        def experts(num_local_experts: int, config: TransformerConfig, pg_collection: Any, **_: Any) -> Experts:
            first = pg_collection.ep.rank() * num_local_experts
            return Experts(range(first, first + num_local_experts), config, pg_collection, lora, quant)

        submodules = MoESubmodules(experts=experts, router=router)
        super().__init__(config, submodules, pg_collection=pg_collection, **kwargs)
        dispatcher = DISPATCHERS[config.moe_token_dispatcher_type]
        self.token_dispatcher = dispatcher(self.num_local_experts, self.local_expert_indices, config, pg_collection)

    router: "Router"
    experts: "Experts"
    token_dispatcher: Any

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Hidden states [S, 1, H], padding_mask bool [1, S] (true: padding) -> [S, 1, H] and no bias."""
        return run_or_recompute(self, super().forward, hidden_states, intermediate_tensors, padding_mask)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Where the experts drop elements, the dispatcher takes the tokens' places along. See `Router.routing`."""
        linear = self.router.linear
        self.token_dispatcher.places = None
        if self.experts.drops:
            assert linear.draw is not None
            self.token_dispatcher.places = linear.draw.shard(linear.group)
        return super().preprocess(hidden_states, probs, routing_map)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """What the dispatcher brought -> what it takes back, and no bias."""
        rows = self.token_dispatcher.dispatch_postprocess(hidden_states, probs)
        outputs = self.experts(*rows, unread=self.token_dispatcher.skips)
        return self.token_dispatcher.combine_preprocess(outputs), None

    def base_shards(self) -> Iterator[Shard]:
        yield from self.router.linear.base_shards()
        yield from self.experts.base_shards()

    def adapter_shards(self) -> Iterator[Shard]:
        yield from self.router.linear.adapter_shards()
        yield from self.experts.adapter_shards()


class Router(TopKRouter):
    """Top-k softmax routing in fp32, with LoRA on the gate. It is replicated on every rank and sees a sequence shard.

    It accumulates `tokens_per_expert`, int64 [experts], the tokens routed to each expert, and, while `balance_weights`,
    fp32 [experts], are set, `probability_sums`, fp64 [experts], the softmax over all experts summed over tokens.
    Padding and recomputed forwards do not count. Balance weights w add a term to the loss: the sum of w_e p_te over
    tokens t and experts e (see `train.expert_load`, which owns these tensors).

    If `moe_expert_capacity_factor` is set, an expert in training accepts at most that many times tokens * k / experts
    of this rank's tokens, those with the highest weights, as in megatron-core. `dropped` counts the choices that were
    rejected; `tokens_per_expert` includes them.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, lora: LoraSettings, **kwargs: Any
    ) -> None:
        self.capacity_factor = config.moe_expert_capacity_factor
        plain = copy.copy(config)
        plain.moe_expert_capacity_factor = None  # megatron-core's dropping counts padding and also drops in validation
        super().__init__(plain, pg_collection, **kwargs)
        del self.weight  # `linear` holds it
        common = {"lora": lora, "group": pg_collection.tp, "dtype": config.params_dtype}
        common["writer"] = pg_collection.dp.rank() == 0
        self.linear = LoraLinear(config.hidden_size, {"gate": config.num_moe_experts}, "replicated", **common)
        self.tokens_per_expert = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=host.device())
        self.probability_sums = torch.zeros(config.num_moe_experts, dtype=torch.float64, device=host.device())
        self.dropped = torch.zeros((), dtype=torch.int64, device=host.device())
        self.balance_weights: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """input [S, 1, H] -> logits, fp32 [S, 1, experts]."""
        x, weight = input.flatten(0, -2), self.linear.weight
        assert isinstance(weight, Tensor)  # never in 4 bits
        logits = self.linear.multiply(x.float(), weight.float()) if self.linear.adapted else gate(x, weight)
        return logits.view(*input.shape[:-1], -1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits fp32 [S, 1, E], padding_mask bool [S, 1] (true: padding) -> weights fp32 [S, k], experts int32 [S, k].

        The experts of a token ascend; E in place of one is a choice that was dropped.
        """
        logits = logits.flatten(0, -2)
        weights, chosen = top_experts(logits, self.topk, self.config.moe_router_pre_softmax)
        recomputes = recomputing()
        real = None if padding_mask is None else ~padding_mask.view(-1)
        if not recomputes:
            count_experts(self.tokens_per_expert, chosen, real)
        if self.capacity_factor:
            chosen = self._limited(weights.detach(), chosen, real, count=not recomputes)
        if self.balance_weights is not None:
            scores = logits.softmax(dim=-1)
            scores = scores if real is None else scores * real[:, None]
            if not recomputes:
                self.probability_sums += scores.detach().sum(0)
            weights = MoEAuxLossAutoScaler.apply(weights, (scores @ self.balance_weights).sum())
        return weights, chosen

    def _limited(self, weights: Tensor, chosen: Tensor, real: Tensor | None, count: bool) -> Tensor:
        """The choices [S, k] without those of padding and, in training, those beyond an expert's capacity."""
        experts = len(self.tokens_per_expert)
        if real is not None:
            chosen = chosen.masked_fill(~real[:, None], experts)
        if not self.training:
            return chosen
        at, demanded = chosen.long(), chosen < experts
        dense = weights.new_zeros(len(weights), experts + 1).scatter_(1, at, weights)
        mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, at, True)
        _, kept = apply_router_token_dropping(
            dense[:, :experts], mask[:, :experts], router_topk=self.topk,
            capacity_factor=self.capacity_factor,
        )  # fmt: skip
        kept = kept.gather(1, at.clamp_max(experts - 1)) & demanded
        if count:
            self.dropped += demanded.sum() - kept.sum()
        return chosen.masked_fill(~kept, experts)


class Experts(Sharded):
    """All experts of this rank: two grouped linear layers around SwiGLU."""

    def __init__(
        self,
        experts: range,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        lora: LoraSettings,
        quant: QuantSettings | None,
    ) -> None:
        super().__init__()
        h, f = config.hidden_size, config.moe_ffn_hidden_size
        common = {"lora": lora, "group": pg_collection.expt_tp, "dtype": config.params_dtype}
        common |= {"writer": pg_collection.expt_dp.rank() == 0, "quant": quant}
        self.gate_up = GroupedLoraLinear(experts, h, {"gate_proj": f, "up_proj": f}, "column", **common)
        self.down = GroupedLoraLinear(experts, f, {"down_proj": h}, "row", **common)

    @property
    def drops(self) -> bool:
        """Whether the input of one of the two layers is subject to dropout."""
        return self.gate_up.drops or self.down.drops

    def forward(
        self, x: Tensor, ends: Tensor, weights: Tensor, counters: Tensor | None, unread: bool = False
    ) -> Tensor:
        """x [n, H] sorted by expert, ends int32 [E] (of each expert's rows), routing weights fp32 [n] -> [n, H].

        `counters`, int64 [n], tell the rows of all experts apart, for dropout. `unread`: see `lora.recompute`.
        """
        rows = host.grouped_rows(x.dtype)
        if rows == 1:
            return self._run(x, ends, weights, counters, unread)
        counts = ends.diff(prepend=ends.new_zeros(1))
        padded = (counts + rows - 1) // rows * rows
        offsets = padded.cumsum(0, dtype=torch.int32)
        shift = (offsets - padded) - (ends - counts)
        at = torch.arange(x.shape[0], device=x.device) + shift.repeat_interleave(counts)
        total = int(offsets[-1])
        wide = x.new_zeros(total, x.shape[1]).index_copy(0, at, x)
        wide_weights = weights.new_zeros(total).index_copy(0, at, weights)
        if counters is not None:
            counters = counters.new_zeros(total).index_copy(0, at, counters)
        return self._run(wide, offsets, wide_weights, counters, unread).index_select(0, at)

    def _run(self, x: Tensor, ends: Tensor, weights: Tensor, counters: Tensor | None, unread: bool) -> Tensor:
        # `down` is linear, so the routing weights can scale the F-wide activations instead of the H-wide outputs.
        return self.down(swiglu(self.gate_up(x, ends, counters), weights), ends, counters, unread)

    def base_shards(self) -> Iterator[Shard]:
        yield from self.gate_up.base_shards()
        yield from self.down.base_shards()

    def adapter_shards(self) -> Iterator[Shard]:
        yield from self.gate_up.adapter_shards()
        yield from self.down.adapter_shards()


def run_or_recompute(mlp: Any, run: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """`run(x, *args)`, a forward of `mlp`; with selective recomputation it keeps x and runs again for its backward."""
    if not (mlp.config.recompute_granularity == "selective" and mlp.training):
        return run(x, *args)
    linears = [module for module in mlp.modules() if isinstance(module, ShardedLinear)]
    draw = linears[0].draw  # that of all; other micro batches may come between forward and backward

    def run_as_now(*args: Any) -> Any:
        for linear in linears:
            linear.draw = draw
        return run(*args)

    return tensor_parallel.checkpoint(run_as_now, False, x, *args)
