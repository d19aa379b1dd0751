"""Formulas for the traffic of one optimizer step: calls and bytes of one rank, per group and kind of collective.

b: bytes of an activation or weight; gradients are reduced in fp32. w: bytes of a routing weight, fp32, or with dropout
fp64, which holds the place of its token too. T, n: tokens and supervised tokens of a micro batch;
E: experts, k: experts per token. Groups of one rank send nothing and are left out. Bytes are those of the larger side:
the gathered tensor, or the tensor to scatter; for an all-to-all, the rank's input.
"""

from collections import Counter
from dataclasses import dataclass
from math import lcm
from typing import Any

from transformers import Qwen3MoeConfig

from megasft.config.parallelism import TopologySizes, choose_dispatcher
from megasft.model.shape import sparse_layers
from megasft.train.trainer import Trainer
from tests.support import on_ranks
from tests.support.traffic import Traffic

SHAPE_MESSAGE = 3 * 8  # a pipeline stage tells the next the shape of what it sends, int64


@dataclass
class StepTraffic:
    """Formulas for a rank of pipeline stage `stage`, with LoRA of rank `r` on every linear layer.

    `calls` and `bytes` are by (group, kind). `forwards` is how often a layer runs forward per micro batch: 2 with
    recomputation. `counts_first` adds the forward without a head that the load-balancing loss needs.
    """

    config: Qwen3MoeConfig
    sizes: TopologySizes
    stage: int
    r: int
    dispatcher: str
    forwards: int = 2
    counts_first: bool = False
    b: int = 4
    w: int = 4
    uneven: bool = False  # with an all-to-all and expert-tensor ranks: count calls of gathers of uneven length only

    def __post_init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        everywhere = sparse_layers(self.config)
        here = len(everywhere) // self.sizes.pipeline
        sparse = everywhere[self.stage * here : (self.stage + 1) * here]
        self.sparse_everywhere, self.layers, self.sparse = sum(everywhere), here, sum(sparse)
        self.is_first, self.is_last = self.stage == 0, self.stage == self.sizes.pipeline - 1

    def of(self, micro_batches: list[tuple[int, int]]) -> "StepTraffic":
        """Add the traffic of a step whose micro batches have these (T, n) on this rank."""
        for tokens, supervised in micro_batches:
            self._layers(tokens, self.forwards + self.counts_first)
            self._ends(tokens, supervised)
            self._pipeline(tokens)
        self._gradients()
        self._sums()
        return self

    def _add(self, group: str, ranks: int, kind: str, size: int, times: int = 1) -> None:
        if ranks > 1 and times:
            self.calls[group, kind] += times
            self.bytes[group, kind] += times * size

    def _layers(self, tokens: int, forwards: int) -> None:
        """Forward: gather before a column-parallel product, scatter after a row-parallel one; backward: the reverse."""
        s, config = self.sizes, self.config
        hidden = tokens * config.hidden_size * self.b
        pairs = self.layers + (self.layers - self.sparse)  # attention everywhere, the MLP of dense layers
        self._add("tp", s.tensor, "all-gather", hidden, pairs * (forwards + 1))
        # Without recomputation the first product asks no gradient of the embedding, which is frozen.
        asked_by_none = self.is_first and self.forwards == 1
        self._add("tp", s.tensor, "reduce-scatter", hidden, pairs * (forwards + 1) - asked_by_none)
        sharing = s.expert * s.expert_tensor
        group = ("expert tp x ep", sharing)
        if self.dispatcher == "allgather":
            tokens = tokens * sharing // s.tensor
            hidden, weights = tokens * config.hidden_size, tokens * config.num_experts * self.w
            # to the experts in the dtype of activations; their outputs are summed in fp32
            for kind, times in (("all-gather", forwards), ("reduce-scatter", 1)):
                self._add(*group, kind, hidden * self.b, self.sparse * times)
            for kind, times in (("reduce-scatter", forwards), ("all-gather", 1)):
                self._add(*group, kind, hidden * 4, self.sparse * times)
            self._add(*group, "all-gather", weights, self.sparse * forwards)
            self._add(*group, "reduce-scatter", weights, self.sparse)
            self._add(*group, "all-gather", tokens * config.num_experts, self.sparse * forwards)  # the choices, bool
        else:
            assert s.expert_tensor == 1 or self.uneven, (
                "gathers of uneven length are made of even ones on gloo: their bytes say nothing"
            )
            if self.uneven:
                self._add("expert tp", s.expert_tensor, "all-gather", 0, self.sparse * (2 * forwards + 1))
                self._add("expert tp", s.expert_tensor, "reduce-scatter", 0, self.sparse * (forwards + 2))
            rows = tokens // s.tensor * config.num_experts_per_tok
            self._add(*group, "all-gather", s.expert * config.num_experts * 8, self.sparse * forwards)  # counts, int64
            there_and_back = 2 * self.sparse * (forwards + 1)
            self._add("ep", s.expert, "all-to-all", rows * config.hidden_size * self.b, there_and_back)
            self._add("ep", s.expert, "all-to-all", rows * self.w, self.sparse * (forwards + 1))  # routing weights

    def _ends(self, tokens: int, supervised: int) -> None:
        """The embedding's sum over the vocabulary's shards; the head's gather and its two sums over supervised tokens."""
        t, hidden = self.sizes.tensor, tokens * self.config.hidden_size * self.b
        if self.is_first:
            self._add("tp", t, "reduce-scatter", hidden, 1 + self.counts_first)
        if self.is_last:
            self._add("tp", t, "all-gather", hidden)
            self._add("tp", t, "reduce-scatter", hidden)
            self._add("tp", t, "all-reduce", supervised * 4)
            self._add("tp", t, "all-reduce", 2 * supervised * 4)

    def _pipeline(self, tokens: int) -> None:
        """Hidden states in one direction and their gradients in the other, each preceded by its shape."""
        shard = tokens // self.sizes.tensor * self.config.hidden_size * self.b
        for size in (SHAPE_MESSAGE, shard):
            forwards = 1 + self.counts_first
            if not self.is_last:
                self._add("pp", self.sizes.pipeline, "send", size, forwards)
                self._add("pp", self.sizes.pipeline, "receive", size)
            if not self.is_first:
                self._add("pp", self.sizes.pipeline, "receive", size, forwards)
                self._add("pp", self.sizes.pipeline, "send", size)

    def adapters(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Elements of this rank's adapter matrices: of attention, router and dense MLP, and of those among them that are
        replicated over tensor parallel; the same two for the experts, over expert-tensor parallel.
        """
        c, t, et, r = self.config, self.sizes.tensor, self.sizes.expert_tensor, self.r
        h, d = c.hidden_size, c.head_dim
        q, kv, f = c.num_attention_heads * d // t, c.num_key_value_heads * d // t, c.intermediate_size // t
        whole = [3 * r * h, h * r] * self.layers  # A of q, k and v; B of o
        whole += [r * h, c.num_experts * r] * self.sparse  # the router
        whole += [2 * r * h, h * r] * (self.layers - self.sparse)  # A of gate and up; B of down
        split = [q * r, kv * r, kv * r, r * q] * self.layers + [f * r, f * r, r * f] * (self.layers - self.sparse)
        experts, f = c.num_experts // self.sizes.expert, c.moe_intermediate_size // et
        r = -(-r // 8) * 8  # grouped kernels want it so
        whole_experts = [experts * 2 * r * h, experts * h * r] * self.sparse
        split_experts = [experts * f * r, experts * f * r, experts * r * f] * self.sparse
        return whole + split, whole, whole_experts + split_experts, whole_experts

    def _gradients(self) -> None:
        """Once per step: sum partial gradients of replicated matrices, scatter gradients, gather weights."""
        s = self.sizes
        dense, whole, experts, whole_experts = self.adapters()
        self._add("tp", s.tensor, "all-reduce", 4 * sum(whole))
        self._add("expert tp", s.expert_tensor, "all-reduce", 4 * sum(whole_experts), bool(whole_experts))
        world = s.tensor * s.pipeline * s.data
        expert_data = world // (s.expert * s.expert_tensor * s.pipeline)
        for group, ranks, matrices in (("dp", s.data, dense), ("expert dp", expert_data, experts)):
            elements = buffer_elements(matrices, ranks)
            self._add(group, ranks, "reduce-scatter", 4 * elements, bool(matrices))
            self._add(group, ranks, "all-gather", self.b * elements, bool(matrices))

    def _sums(self) -> None:
        """A few numbers: the supervised tokens, the gradient norm, the loss, the experts' counts and dropped choices."""
        s, experts = self.sizes, self.config.num_experts
        world = s.tensor * s.pipeline * s.data
        self._add("dp", s.data, "all-reduce", 4)
        self._add("pp", s.pipeline, "broadcast", 4)
        self._add("norm", world, "all-reduce", 4)
        self._add("world", world, "all-reduce", 8 * (3 + (self.sparse_everywhere + 1) * experts))
        if self.counts_first:
            self._add("world", world, "all-reduce", 8 * (2 + (self.sparse_everywhere + 1) * experts))


def buffer_elements(matrices: list[int], ranks: int) -> int:
    """Elements of megatron-core's buffer: each matrix starts at a multiple of 64, the total at a multiple of lcm(ranks, 128)."""
    end = 0
    for elements in matrices:
        end = -(-end // 64) * 64 + elements
    multiple = lcm(ranks, 128)
    return -(-end // multiple) * multiple


def measured_and_expected(
    settings: dict[str, Any], samples: list[on_ranks.Sample]
) -> tuple[tuple[Counter, Counter], tuple[Counter, Counter]]:
    """On a rank: ((calls, bytes) of its second step, the same by formula)."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.train_step()
    compute, seen = trainer._compute, []

    def spied(batches, training):
        seen.extend((len(batch.tokens), len(batch.supervised)) for batch in batches)
        return compute(batches, training)

    trainer._compute = spied
    with Traffic() as traffic:
        trainer.train_step()
    parallelism = config.hyperparameters.parallelism
    formulas = StepTraffic(
        model.hf_config,
        topology.sizes,
        topology.groups.pp.rank(),
        config.lora.r,
        choose_dispatcher(parallelism.token_dispatcher, topology.sizes),
        forwards=1 + parallelism.activation_checkpointing,
        counts_first=bool(config.hyperparameters.router_aux_loss_coef),
        b=2 if parallelism.bf16 else 4,
        w=8 if config.lora.dropout else 4,
    ).of(seen)
    return (traffic.calls, traffic.bytes), (formulas.calls, formulas.bytes)
