"""Traffic of one optimizer step: calls and bytes of one rank, per group and kind of collective.

Gradients are reduced in fp32. A routing weight travels in fp32, or with dropout in fp64, which holds the place of its
token too. Groups of one rank send nothing and are left out. Bytes are those of the larger side: the gathered tensor, or
the tensor to scatter; for an all-to-all, the rank's input.
"""

from collections import Counter
from dataclasses import dataclass

from megasft.plan.job import Job
from megasft.plan.state import trained

OWN_NUMBERS = 47  # of each rank, exchanged for a line of metrics.jsonl
SHAPE_MESSAGE = 3 * 8  # a pipeline stage tells the next the shape of what it sends, int64


@dataclass
class StepTraffic:
    """Traffic of a job's rank. `calls` and `bytes` are by (group, kind)."""

    job: Job
    uneven: bool = False  # with an all-to-all and expert-tensor ranks: count calls of gathers of uneven length only
    recorded: bool = True  # whether the step gets a line in metrics.jsonl, and the exchange for it is counted

    def __post_init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        job = self.job
        self.config, self.sizes, self.dispatcher = job.shape, job.sizes, job.dispatcher
        self.counts_first = job.counts_first
        self.b = job.width
        self.places = bool(job.dropout and job.targets & {"gate_proj", "up_proj", "down_proj"})  # go to the experts
        self.sparse_everywhere = job.sparse_everywhere
        self.layers, self.sparse = len(job.layers), sum(job.layers)
        self.is_first, self.is_last = job.is_first, job.is_last

    def of(self, micro_batches: list[tuple[int, int]]) -> "StepTraffic":
        """Add the traffic of a step whose micro batches have these (T, n) on this rank."""
        for tokens, supervised in micro_batches:
            self._layers(tokens)
            self._ends(tokens, supervised)
            self._pipeline(tokens)
        self._gradients()
        self._sums()
        return self

    def _add(self, group: str, ranks: int, kind: str, size: int, times: int = 1) -> None:
        if ranks > 1 and times:
            self.calls[group, kind] += times
            self.bytes[group, kind] += times * size

    def _layers(self, tokens: int) -> None:
        """Forward: gather before a column-parallel product, scatter after a row-parallel one; backward: the reverse.

        The last scatter of a layer is left out where the layer is computed again.
        """
        s, config, again = self.sizes, self.config, self.job.again
        first = 1 + self.counts_first
        attention, forwards = first + self.job.attention_again, first + again  # forwards of attention and of the MLP
        hidden = tokens * config.hidden_size * self.b
        dense = self.layers - self.sparse
        pairs = self.layers * (attention + 1) + dense * (forwards + 1)
        self._add("tp", s.tensor, "all-gather", hidden, pairs)
        # Without recomputation the first product asks no gradient of the embedding, which is frozen.
        asked_by_none = self.is_first and not again
        self._add("tp", s.tensor, "reduce-scatter", hidden, pairs - asked_by_none - dense * again)
        sharing = s.expert * s.expert_tensor
        group = ("expert tp x ep", sharing)
        if self.dispatcher == "allgather":
            tokens = tokens * sharing // s.tensor
            hidden, k = tokens * config.hidden_size * self.b, config.num_experts_per_tok
            self._add(*group, "all-gather", hidden, self.sparse * (forwards + 1))
            self._add(*group, "reduce-scatter", hidden, self.sparse * (forwards + 1 - again))
            # each choice's expert and weight, and the token's place
            self._add(*group, "all-gather", tokens * (8 * k + 8 * self.places), self.sparse * forwards)
            self._add(*group, "reduce-scatter", tokens * 4 * k, self.sparse)
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
            self._add(
                "ep", s.expert, "all-to-all", rows * (8 if self.places else 4), self.sparse * (forwards + 1)
            )  # routing weights

    def _ends(self, tokens: int, supervised: int) -> None:
        """The embedding's sum over the vocabulary's shards; the head's gather, and its sums over supervised tokens."""
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

    def _gradients(self) -> None:
        """Once per step: sum partial gradients of replicated matrices, scatter gradients, gather weights."""
        s = self.sizes
        for (whole, size), tensor, replicas in zip(
            trained(self.job),
            (("tp", s.tensor), ("expert tp", s.expert_tensor)),
            (("dp", s.data), ("expert dp", self.job.expert_data)),
            strict=True,
        ):
            self._add(*tensor, "all-reduce", 4 * whole, bool(whole))
            self._add(*replicas, "reduce-scatter", 4 * size, bool(size))
            self._add(*replicas, "all-gather", self.b * size, bool(size))

    def _sums(self) -> None:
        """A few numbers: supervised tokens, the gradient norm, the loss and right predictions, the experts' counts."""
        s, experts = self.sizes, self.config.num_experts
        world = s.tensor * s.pipeline * s.data
        self._add("dp", s.data, "all-reduce", 4)
        self._add("pp", s.pipeline, "broadcast", 4)
        self._add("norm", world, "all-reduce", 4)
        self._add("world", world, "all-reduce", 8 * (4 + (self.sparse_everywhere + 1) * experts))
        if self.recorded:  # the ranks' own numbers, between the hosts
            self._add("world", world, "all-to-all", 8 * world * OWN_NUMBERS)
        if self.counts_first:
            self._add("world", world, "all-reduce", 8 * (2 + (self.sparse_everywhere + 1) * experts))
