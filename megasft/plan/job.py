"""A rank's part of a job: sizes of the model, topology, batch."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megasft.config.parallelism import TopologySizes, choose_dispatcher, fit
from megasft.config.schema import QuantSettings, RunConfig
from megasft.config.values import Recompute
from megasft.model.shape import PlainShape, Shape, head_dim, sparse_layers, stage_layers


@dataclass(frozen=True)
class Job:
    """What the formulas need of a run file, for the rank `rank` of its world.

    Attributes:
        targets: names of the adapted layers; "gate" is the router.
        width: bytes of a weight or activation, 2 or 4.
        tokens: T, of a micro batch of `samples`. supervised: positions among them that have a loss. length: of a
            conversation, for attention.
        micro_batches: of a data-parallel rank in an optimizer step.
        imbalance: rows of the busiest rank's experts, as a multiple of the mean.
    """

    shape: PlainShape
    sizes: TopologySizes
    r: int
    targets: frozenset[str]
    dispatcher: str
    tokens: int
    supervised: int
    length: int
    micro_batches: int
    dropout: bool = True
    width: int = 2
    recompute: Recompute = True
    counts_first: bool = False
    decay: bool = False
    quant: QuantSettings | None = None
    imbalance: float = 1.0
    rank: int = 0
    samples: int = 1

    @classmethod
    def of(cls, config: RunConfig, shape: Shape, ranks: int) -> "Job":
        """The job of a run file on `ranks` ranks, with full micro batches, all of whose tokens are supervised.

        Raises ValueError with the rest of a sentence where the topology does not fit the ranks.
        """
        hyper, parallel = config.hyperparameters, config.hyperparameters.parallelism
        sizes = fit(config.data.topology, ranks)
        length = hyper.sequence_length - 1  # the last token of a sample is only a target
        tokens = -(-hyper.per_device_batch * length // sizes.tensor) * sizes.tensor
        return cls(
            shape=PlainShape.of(shape), sizes=sizes, r=config.lora.r, targets=config.lora.targets,
            dispatcher=choose_dispatcher(parallel.token_dispatcher, sizes),
            tokens=tokens, supervised=hyper.per_device_batch * length, length=length,
            micro_batches=hyper.gradient_accumulation_steps, samples=hyper.per_device_batch,
            dropout=config.lora.dropout > 0,
            width=2 if parallel.bf16 else 4, recompute=parallel.activation_checkpointing,
            counts_first=bool(hyper.router_aux_loss_coef), decay=hyper.weight_decay > 0,
            quant=config.quant if config.training.use_qlora else None,
        )  # fmt: skip

    def of_rank(self, rank: int) -> "Job":
        """The same job as another rank sees it."""
        return replace(self, rank=rank)

    @property
    def again(self) -> int:
        """How often experts and dense MLPs run forward for their backward."""
        return int(bool(self.recompute))

    @property
    def attention_again(self) -> int:
        """The same of attention and what is around it."""
        return int(self.recompute is True)

    @property
    def world(self) -> int:
        """Ranks."""
        return self.sizes.tensor * self.sizes.pipeline * self.sizes.data

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.samples * self.micro_batches * self.sizes.data

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.rank * self.sizes.pipeline // self.world

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the head."""
        return self.stage == self.sizes.pipeline - 1

    @cached_property
    def layout(self) -> "Job":
        """The part of the job that its state depends on, the same for all batches."""
        return replace(
            self, tokens=0, supervised=0, length=0, micro_batches=0, samples=0, dispatcher="", dropout=False,
            recompute=False, counts_first=False, imbalance=1.0,
        )  # fmt: skip

    @cached_property
    def layers(self) -> list[bool]:
        """For each layer of this stage, whether it has experts."""
        return _layers(self.shape, self.sizes.pipeline)[self.stage]

    @property
    def sparse_everywhere(self) -> int:
        """Layers with experts, of all stages."""
        return sum(map(sum, _layers(self.shape, 1)))

    @cached_property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        s = self.sizes
        return self.world // (s.expert * s.expert_tensor * s.pipeline)

    @property
    def data_rank(self) -> int:
        """This rank's place among those that hold the same layers."""
        return self.rank // self.sizes.tensor % self.sizes.data

    @property
    def expert_data_rank(self) -> int:
        """This rank's place among those that hold the same experts."""
        return self.rank // (self.sizes.expert * self.sizes.expert_tensor) % self.expert_data

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return head_dim(self.shape)

    @property
    def queries(self) -> int:
        """Outputs of q_proj on this rank."""
        return self.shape.num_attention_heads * self.head_dim // self.sizes.tensor

    @property
    def keys(self) -> int:
        """Outputs of k_proj, and of v_proj, on this rank."""
        return self.shape.num_key_value_heads * self.head_dim // self.sizes.tensor

    @property
    def experts(self) -> int:
        """Experts on this rank, in each layer."""
        return int(self.shape.num_experts) // self.sizes.expert

    @property
    def expert_width(self) -> int:
        """Intermediate size of an expert on this rank."""
        return int(self.shape.moe_intermediate_size) // self.sizes.expert_tensor

    @property
    def dense_width(self) -> int:
        """Intermediate size of a dense layer on this rank."""
        return int(self.shape.intermediate_size) // self.sizes.tensor

    @property
    def padded_r(self) -> int:
        """Rank of the experts' adapters in memory: grouped kernels want a multiple of 8."""
        return -(-self.r // 8) * 8

    @property
    def rows(self) -> int:
        """Rows that the experts of this rank multiply in a layer: copies of tokens, `imbalance` times the mean."""
        s = self.sizes
        mean = self.tokens * int(self.shape.num_experts_per_tok) * s.expert_tensor // s.tensor
        return round(mean * (self.imbalance if s.expert > 1 else 1.0))

    @property
    def heaviest(self) -> list["Job"]:
        """The first rank of each pipeline stage that may need most time or memory: the first stage, the last, and of
        those between, which have as many layers, the one with most micro batches in flight.
        """
        stages = self.sizes.pipeline
        return [self.of_rank(stage * self.world // stages) for stage in sorted({0, min(1, stages - 1), stages - 1})]


@lru_cache(256)
def _layers(shape: PlainShape, stages: int) -> list[list[bool]]:
    """For each stage and each of its layers, whether it has experts."""
    everywhere, found = iter(sparse_layers(shape)), stage_layers(shape.num_hidden_layers, stages)
    return [[next(everywhere) for _ in range(layers)] for layers in found]
