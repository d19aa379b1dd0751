"""Seconds of a step by a roofline: an estimate from the constants of `devices`, never a measurement.

A layer's products take the larger of their FLOPs and their bytes, each at its share of the data sheet's rate; all else
moves bytes. Collectives are not hidden behind computation, for nothing in megasft overlaps them.
"""

from dataclasses import dataclass

from megasft.plan.devices import CONSTANTS, Constants, Gpu
from megasft.plan.job import Job
from megasft.plan.state import adapters, elements
from megasft.plan.traffic import StepTraffic

KERNELS = {False: (90, 107), True: (110, 139)}  # per layer: of one forward, and of a backward; bf16, and 4-bit


@dataclass(frozen=True)
class Flops:
    """FLOPs of a rank in a step; a multiplication plus an addition counts as two. `model` leaves recomputation out."""

    dense: float
    experts: float
    attention: float
    head: float
    recomputed: float

    @property
    def model(self) -> float:
        """FLOPs that the model needs: forward, and backward of frozen layers and adapters."""
        return self.dense + self.experts + self.attention + self.head


@dataclass(frozen=True)
class Time:
    """Seconds of a step on the busiest rank, by what they are spent on."""

    parts: dict[str, float]
    bubble: float  # share of the step that a pipeline stage idles
    tokens: int  # of the global batch
    ranks: int
    flops: Flops
    peak_rate: float

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        return self.tokens / self.seconds / self.ranks

    @property
    def mfu(self) -> float:
        """The model's FLOPs over what the data sheet promises."""
        return self.flops.model / self.seconds / self.peak_rate


def flops(job: Job) -> Flops:
    """Of this rank: frozen weights 4 per weight and token (2 in forward, 2 for the gradient of the input), LoRA 6."""
    dense, experts, lora_dense, lora_experts = _weights(job)
    t, n, m = job.tokens, _mean_rows(job), job.micro_batches
    scores = len(job.layers) * job.queries * t * job.longest / 2
    once = 2 * t * (dense + lora_dense) + 2 * n * (experts + lora_experts)
    head = 4 * job.supervised * job.shape.hidden_size * job.shape.vocab_size / job.sizes.tensor * job.is_last
    again = job.recompute + job.counts_first
    return Flops(
        m * t * (4 * dense + 6 * lora_dense), m * n * (4 * experts + 6 * lora_experts), m * 14 * scores, m * head,
        m * again * (once + 4 * scores),
    )  # fmt: skip


def estimate(job: Job, gpu: Gpu, per_node: int, constants: Constants = CONSTANTS) -> Time:
    """The step of the stage that takes longest, with the pipeline's bubble."""
    stages = range(job.sizes.pipeline)
    ranks = [job.of_rank(stage * job.world // job.sizes.pipeline) for stage in stages]
    times = [_stage(rank, gpu, per_node, constants) for rank in ranks]
    slowest = max(range(len(times)), key=lambda stage: sum(times[stage].values()))
    m, p = job.micro_batches, job.sizes.pipeline
    parts = dict(times[slowest])
    idle = (p - 1) / m * sum(parts.values())
    if p > 1:
        parts["pipeline bubble"] = idle
    work = [flops(rank) for rank in ranks]
    mean = Flops(*(sum(getattr(one, name) for one in work) / p for name in Flops.__dataclass_fields__))
    return Time(parts, idle / sum(parts.values()), job.tokens * m * job.sizes.data, job.world, mean, gpu.flops)


def _stage(job: Job, gpu: Gpu, per_node: int, c: Constants) -> dict[str, float]:
    work, m, layers = flops(job), job.micro_batches, len(job.layers)
    again = 1 + (job.recompute + job.counts_first) * 0.5  # of forward and backward, each half
    per_expert = job.rows / max(1, job.experts)
    dense_rate = gpu.flops * c.dense * _filled(job.tokens, c)
    grouped_rate = gpu.flops * c.grouped * _filled(per_expert, c)
    bandwidth = gpu.hbm * c.memory
    dense, experts, _, _ = _weights(job)
    passes = m * (2 + job.recompute + job.counts_first)
    rows = job.rows / max(1, _mean_rows(job))  # the busiest rank
    parts = {
        # each pass reads the weights once
        "experts' products": max(rows * work.experts * again / grouped_rate,
                                 passes * job.width * experts_held(job) / bandwidth),
        "other products": max(work.dense * again / dense_rate, passes * job.width * dense / bandwidth),
        "attention": work.attention * (1 + (job.recompute + job.counts_first) * 2 / 7) / (gpu.flops * c.attention),
        "loss head": work.head / (gpu.flops * c.dense) + m * job.is_last * _head_bytes(job) / bandwidth,
        "elementwise, sorting, copies": m * _moved(job) / bandwidth,
    }  # fmt: skip
    if job.quant:
        parts["dequantization"] = passes * (dense + experts_held(job)) * 2.6 / bandwidth
    forward, backward = KERNELS[job.quant is not None]
    kernels = m * layers * (forward * (1 + job.recompute + job.counts_first) + backward)
    parts["launches"] = max(0.0, kernels * c.launch - sum(parts.values()))
    parts |= _collectives(job, gpu, per_node, c)
    dense_adapters, expert_adapters = map(elements, adapters(job))
    parts["optimizer"] = 30 * (sum(dense_adapters) + sum(expert_adapters)) / job.sizes.data / bandwidth
    return parts


def _filled(rows: float, c: Constants) -> float:
    """The share of a product's rate that so many rows reach."""
    return rows / (rows + c.half_rows)


def _mean_rows(job: Job) -> float:
    s = job.sizes
    return job.tokens * job.shape.num_experts_per_tok * s.expert_tensor / s.tensor


def _weights(job: Job) -> tuple[float, float, float, float]:
    """Weights that a token meets on this rank outside the experts, weights of one expert over all layers, and the same
    of the adapters.
    """
    h, r, t = job.shape.hidden_size, job.r, job.targets
    dense = experts = lora_dense = lora_experts = 0.0
    for sparse in job.layers:
        dense += h * (2 * job.queries + 2 * job.keys)
        lora_dense += r * sum(
            inputs + outputs for name, inputs, outputs in (
                ("q_proj", h, job.queries), ("k_proj", h, job.keys), ("v_proj", h, job.keys), ("o_proj", job.queries, h),
            ) if name in t
        )  # fmt: skip
        f = job.expert_width if sparse else job.dense_width
        lora = r * (h + f) * len(t & {"gate_proj", "up_proj", "down_proj"})
        if sparse:
            experts, lora_experts = experts + 3 * h * f, lora_experts + lora
            dense += h * job.shape.num_experts / job.sizes.tensor  # the router, on a sequence shard
        else:
            dense, lora_dense = dense + 3 * h * f, lora_dense + lora
    return dense, experts, lora_dense, lora_experts


def experts_held(job: Job) -> float:
    """Weights of the experts on this rank."""
    return 3.0 * job.shape.hidden_size * job.expert_width * job.experts * sum(job.layers)


def _head_bytes(job: Job) -> float:
    return 40.0 * job.supervised * job.shape.vocab_size / job.sizes.tensor  # fp32 logits, read and written five times


def _moved(job: Job) -> float:
    """Bytes that kernels other than products move in a micro batch, fitted to counted steps (docs/gpu.md).

    Per row of the experts, forward of a layer some 10 passes over H and 18 over F, and backward twice that; per token
    some 30 passes over H.
    """
    h, f, b = job.shape.hidden_size, job.expert_width, job.width
    per_row = 10.5 * h + 18 * f
    per_token = 30 * h + 18 * (job.queries + 2 * job.keys)
    shard = job.tokens / job.sizes.tensor
    passes = 3 + job.recompute + job.counts_first
    layer = b * (job.rows * per_row + (job.tokens + shard) / 2 * per_token)
    return passes * layer * len(job.layers)


def _collectives(job: Job, gpu: Gpu, per_node: int, c: Constants) -> dict[str, float]:
    """Seconds of each group's collectives: what each rank sends, over the slowest link that the group crosses."""
    traffic = StepTraffic(job, uneven=job.dispatcher == "alltoall" and job.sizes.expert_tensor > 1)
    traffic.of([(job.tokens, job.supervised)])
    micro, step = dict(traffic.bytes), StepTraffic(job, uneven=traffic.uneven).of([])
    s, found = job.sizes, dict[str, float]()
    groups = {
        "tp": (s.tensor, s.tensor), "expert tp": (s.expert_tensor, s.expert_tensor),
        "expert tp x ep": (s.expert * s.expert_tensor,) * 2, "ep": (s.expert, s.expert * s.expert_tensor),
        "pp": (s.pipeline, job.world), "dp": (s.data, s.tensor * s.data),
        "expert dp": (job.expert_data, s.expert * s.expert_tensor * job.expert_data),
        "norm": (job.world, job.world), "world": (job.world, job.world),
    }  # fmt: skip
    for (group, kind), total in micro.items():
        ranks, span = groups[group]
        once = step.bytes[group, kind]
        calls = step.calls[group, kind] + (traffic.calls[group, kind] - step.calls[group, kind]) * job.micro_batches
        sent = once + (total - once) * job.micro_batches
        if kind == "all-to-all":
            sent = round(sent * job.rows / max(1.0, _mean_rows(job)))
        share = {"all-reduce": 2 * (ranks - 1) / ranks, "send": 1.0, "receive": 0.0, "broadcast": 1.0}
        rate = (gpu.link if span <= per_node else gpu.network) * c.links
        found[f"collectives: {group}"] = found.get(f"collectives: {group}", 0.0) + (
            sent * share.get(kind, (ranks - 1) / ranks) / rate + calls * c.latency
        )
    return found
