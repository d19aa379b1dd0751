"""Seconds of a step by a roofline: an estimate from the constants of `devices`, never a measurement.

A layer's products take the larger of their FLOPs and their bytes, each at its share of the data sheet's rate; all else
moves bytes. Collectives are not hidden behind computation, for nothing in megasft overlaps them.
"""

from dataclasses import dataclass

from megasft.model.flops import Flops, step_flops
from megasft.plan.devices import CONSTANTS, Constants, Gpu
from megasft.plan.job import Job
from megasft.plan.state import owned
from megasft.plan.traffic import StepTraffic

# Per layer: of a forward, of attention and of an MLP that are run again for the backward, and of a backward; bf16, and
# 4-bit (docs/gpu.md).
KERNELS = {False: (33, 13, 14, 50), True: (41, 17, 16, 58)}
# FLOPs of attention for each multiplication of one of its products: forward 2 products, backward 5 in flash attention,
# which computes one of forward's again.
ATTENTION_FORWARD, ATTENTION_BACKWARD = 4, 10


@dataclass(frozen=True)
class Time:
    """Seconds of a step on the busiest rank, by what they are spent on. `sent`: bytes of that rank over each group's
    links in a step. `tokens` are of the global batch; `flops` over all ranks.
    """

    parts: dict[str, float]
    sent: dict[str, float]
    tokens: int
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
        return self.flops.model / self.ranks / self.seconds / self.peak_rate

    @property
    def flops_per_token(self) -> dict[str, float]:
        """Of forward, backward and recomputation."""
        f = self.flops
        forward = f.frozen / 2 + f.lora / 3 + f.attention / 3 + f.head / 2
        return {
            name: work / self.tokens
            for name, work in (
                ("forward", forward), ("backward", f.model - forward), ("recomputation", f.recomputed),
            )
        }  # fmt: skip


def estimate(job: Job, gpu: Gpu, per_node: int, constants: Constants = CONSTANTS) -> Time:
    """The job's step."""
    parts, sent = step_parts(job, gpu, per_node, constants)
    rows = job.micro_batches * job.sizes.data
    work = step_flops(
        job.shape, job.targets, job.r, job.tokens * rows, job.supervised * rows, job.tokens * rows * job.length,
        job.recompute,
    )  # fmt: skip
    return Time(parts, sent, job.tokens * rows, job.world, work, gpu.flops)


def step_parts(
    job: Job, gpu: Gpu, per_node: int, constants: Constants = CONSTANTS
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step of the stage that takes longest, with the pipeline's bubble; bytes that it sends."""
    stages = (_stage(rank, gpu, per_node, constants) for rank in job.heaviest)
    parts, sent = max(stages, key=lambda one: sum(one[0].values()))
    if job.sizes.pipeline > 1:
        parts["pipeline bubble"] = (job.sizes.pipeline - 1) / job.micro_batches * sum(parts.values())
    return parts, sent


@dataclass(frozen=True)
class Work:
    """FLOPs of a rank in a micro batch: forward, backward, and forwards that are run again."""

    dense: float
    experts: float
    attention: float
    head: float


def rank_work(job: Job) -> Work:
    """Of this rank: frozen weights 4 per weight and token (2 in forward, 2 for the gradient of the input), LoRA 6."""
    held, lora = _weights(job), _adapters(job)
    attention, mlp = job.counts_first + job.attention_again, job.counts_first + job.again
    scores = len(job.layers) * job.queries * job.tokens * job.length / 2
    return Work(
        job.tokens * (
            held.attention * (4 + 2 * attention) + lora.attention * (6 + 2 * attention)
            + held.mlp * (4 + 2 * mlp) + lora.mlp * (6 + 2 * mlp)
        ),
        job.rows * (held.expert * (4 + 2 * experts_again(job)) + lora.expert * (6 + 2 * experts_again(job))),
        scores * (ATTENTION_FORWARD * (1 + attention) + ATTENTION_BACKWARD),
        4.0 * job.supervised * job.shape.hidden_size * job.shape.vocab_size / job.sizes.tensor * job.is_last,
    )  # fmt: skip


def experts_again(job: Job) -> float:
    """How many forwards of the experts' products are run again: without `down`, a third, if its output stays here."""
    stays = job.dispatcher == "allgather" or job.sizes.expert * job.sizes.expert_tensor == 1
    return job.counts_first + job.again * (2 / 3 if stays else 1)


def _stage(job: Job, gpu: Gpu, per_node: int, c: Constants) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, and bytes sent."""
    work, m, bandwidth = rank_work(job), job.micro_batches, gpu.hbm * c.memory
    dense_rate = gpu.flops * c.dense * _filled(job.tokens, c)
    grouped_rate = gpu.flops * c.grouped * _filled(job.rows / job.experts, c)
    held = _weights(job)
    # Each pass reads the weights once.
    dense = sum((2 + again + job.counts_first) * weights for again, weights in (
        (job.attention_again, held.attention), (job.again, held.mlp)
    ))  # fmt: skip
    one = {
        "experts' products": max(
            work.experts / grouped_rate, (2 + experts_again(job)) * job.width * _experts_held(job) / bandwidth
        ),
        "other products": max(work.dense / dense_rate, job.width * dense / bandwidth),
        "attention": work.attention / (gpu.flops * c.attention),
        "loss head": work.head / (gpu.flops * c.dense) + job.is_last * _head_bytes(job) / bandwidth,
        "elementwise, sorting, copies": _moved(job) / bandwidth,
    }  # fmt: skip
    if job.quant:
        dequantized = dense + (2 + experts_again(job)) * _experts_held(job)
        one["dequantization"] = dequantized * DEQUANTIZED_BYTES / bandwidth
    forward, attention, mlp, backward = KERNELS[job.quant is not None]
    again = attention * job.attention_again + mlp * job.again
    kernels = len(job.layers) * (forward * (1 + job.counts_first) + again + backward)
    one["launches"] = max(0.0, kernels * c.launch - sum(one.values()))
    parts = {name: m * seconds for name, seconds in one.items()}
    seconds, sent = _collectives(job, gpu, per_node, c)
    parts |= seconds
    parts["optimizer"] = ADAM_BYTES * sum(owned(job)) / bandwidth
    return parts, sent


DEQUANTIZED_BYTES = 2.6  # read and written for each 4-bit weight: 0.52, and 2 of the 16-bit result
ADAM_BYTES = 30  # read and written for each trained parameter: gradient, master weight, two moments, weight


def _filled(rows: float, c: Constants) -> float:
    """The share of a product's rate that so many rows reach."""
    return rows / (rows + c.half_rows)


@dataclass(frozen=True)
class _Weights:
    """Weights that a token meets here, over all layers: of attention, of routers and dense MLPs, of an expert."""

    attention: float
    mlp: float
    expert: float


def _weights(job: Job) -> _Weights:
    h, sparse, dense = job.shape.hidden_size, sum(job.layers), len(job.layers) - sum(job.layers)
    return _Weights(
        len(job.layers) * h * (2 * job.queries + 2 * job.keys),
        sparse * h * job.shape.num_experts / job.sizes.tensor  # the router, on a sequence shard
        + dense * 3 * h * job.dense_width,
        sparse * 3 * h * job.expert_width,
    )


def _adapters(job: Job) -> _Weights:
    h, r, t = job.shape.hidden_size, job.r, job.targets
    sparse, dense = sum(job.layers), len(job.layers) - sum(job.layers)
    attention = {"q_proj": h + job.queries, "k_proj": h + job.keys, "v_proj": h + job.keys, "o_proj": job.queries + h}
    projections = len(t & {"gate_proj", "up_proj", "down_proj"})
    return _Weights(
        r * len(job.layers) * sum(size for name, size in attention.items() if name in t),
        r * dense * projections * (h + job.dense_width),
        r * sparse * projections * (h + job.expert_width),
    )


def _experts_held(job: Job) -> float:
    """Weights of the experts on this rank."""
    return 3.0 * job.shape.hidden_size * job.expert_width * job.experts * sum(job.layers)


def _head_bytes(job: Job) -> float:
    return 40.0 * job.supervised * job.shape.vocab_size / job.sizes.tensor  # fp32 logits, read and written five times


def _moved(job: Job) -> float:
    """Bytes that kernels other than products move in a micro batch, fitted to counted steps (docs/gpu.md).

    Passes over H and F for each row of the experts, over H, queries and keys for each token.
    """
    h, f, b = job.shape.hidden_size, job.expert_width, job.width
    forwards, again = 1 + job.counts_first, job.again
    per_row = h * (6 * forwards + 3 * again + 8) + f * (8 * forwards + 8 * again + 12)
    per_token = (14 * h + 4 * (job.queries + 2 * job.keys)) * (forwards + job.attention_again + 3.3)
    shard = job.tokens / job.sizes.tensor
    return b * len(job.layers) * (job.rows * per_row + (job.tokens + shard) / 2 * per_token)


# The share of a collective's bytes that a rank sends over its slowest link; of the others (ranks - 1) / ranks.
_SENT = {"send": 1.0, "receive": 0.0, "broadcast": 1.0}


def _collectives(job: Job, gpu: Gpu, per_node: int, c: Constants) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and bytes of each group: what a rank sends, over the slowest link that the group crosses."""
    uneven = job.dispatcher == "alltoall" and job.sizes.expert_tensor > 1
    micro = StepTraffic(job, uneven).of([(job.tokens, job.supervised)])
    once = StepTraffic(job, uneven).of([])
    s = job.sizes
    groups = {  # ranks, and how far apart they are
        "tp": (s.tensor, s.tensor), "expert tp": (s.expert_tensor, s.expert_tensor),
        "expert tp x ep": (s.expert * s.expert_tensor,) * 2, "ep": (s.expert, s.expert * s.expert_tensor),
        "pp": (s.pipeline, job.world), "dp": (s.data, s.tensor * s.data),
        "expert dp": (job.expert_data, s.expert * s.expert_tensor * job.expert_data),
        "norm": (job.world, job.world), "world": (job.world, job.world),
    }  # fmt: skip
    seconds, sent = dict[str, float](), dict[str, float]()
    for (group, kind), size in micro.bytes.items():
        ranks, span = groups[group]
        of_step, calls = once.bytes[group, kind], once.calls[group, kind]
        calls += (micro.calls[group, kind] - calls) * job.micro_batches
        size = of_step + (size - of_step) * job.micro_batches
        share = _SENT.get(kind, (1 + (kind == "all-reduce")) * (ranks - 1) / ranks)
        imbalance = job.imbalance if kind == "all-to-all" else 1.0
        name = f"collectives: {group}"
        sent[group] = sent.get(group, 0.0) + size * share * imbalance
        rate = (gpu.link if span <= per_node else gpu.network) * c.links
        if kind == "all-to-all" and span > per_node:  # what stays in the node doesn't use the network
            share = 1 - per_node / span
        seconds[name] = seconds.get(name, 0.0) + size * share * imbalance / rate + calls * c.latency
    return seconds, sent
