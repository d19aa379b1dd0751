"""Every topology, micro batch, recomputation, packing and precision of the base that a job could have on so many GPUs,
ranked by estimated tokens per second. What is learned stays the same: LoRA, data and global batch are the run file's.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from megasft.config.parallelism import TopologySettings, TopologySizes, choose_dispatcher, derive
from megasft.config.schema import QuantSettings, RunConfig
from megasft.config.values import Recompute
from megasft.messages import UserError
from megasft.model.shape import PlainShape, Shape, check_fits
from megasft.plan.devices import CONSTANTS, IMBALANCE, Gpu
from megasft.plan.job import Job
from megasft.plan.memory import worst_rank
from megasft.plan.plan import Dataset
from megasft.plan.time import step_parts

GiB = 2**30
MICRO_BATCHES = (1, 2, 4, 8, 16)  # samples
RECOMPUTE: tuple[Recompute, ...] = (False, "selective", True)


@dataclass(frozen=True)
class Candidate:
    """A way to run the job. `reason`: why it is rejected; `rate`: useful tokens per second of a GPU otherwise."""

    sizes: TopologySizes
    samples: int
    recompute: Recompute
    four_bits: bool
    packing: bool
    micro_batches: int = 0
    peak: int = 0
    rate: float = 0.0
    reason: str = ""

    def settings(self) -> dict[str, dict[str, object]]:
        """The keys of a run file that differ between candidates, by section."""
        s = self.sizes
        return {
            "data": {"packing": self.packing},
            "data.topology": {
                "tensor_parallel": s.tensor, "data_parallel": s.data, "pipeline_parallel": s.pipeline,
                "expert_parallel": s.expert, "expert_tensor_parallel": s.expert_tensor,
            },
            "training": {"use_qlora": self.four_bits},
            "hyperparameters": {
                "per_device_batch": self.samples, "gradient_accumulation_steps": self.micro_batches,
            },
            "hyperparameters.parallelism": {"activation_checkpointing": self.recompute},
        }  # fmt: skip

    def lines(self) -> str:
        """These as lines of a run file."""
        sections = (
            "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())])
            for name, keys in self.settings().items()
        )
        return "\n\n".join(sections)


def search(
    config: RunConfig,
    shape: Shape,
    ranks: int,
    gpu: Gpu,
    per_node: int,
    dataset: Dataset | None = None,
    usable: float | None = None,
    imbalance: float = IMBALANCE,
) -> list[Candidate]:
    """All candidates: those that fit from the fastest, then the others. `usable`: bytes of a GPU."""
    usable = gpu.memory * (1 - CONSTANTS.reserve) if usable is None else usable
    batch = global_batch(config, ranks)
    alone = config.model_copy(update={"data": config.data.model_copy(update={"topology": TopologySettings()})})
    base = replace(Job.of(alone, shape, 1), imbalance=imbalance)
    found = [
        _judged(candidate, config, base, batch, gpu, per_node, usable, dataset)
        for candidate in _candidates(config, base.shape, ranks, dataset is not None)
    ]
    return sorted(found, key=lambda one: (bool(one.reason), -one.rate, one.peak))


def global_batch(config: RunConfig, ranks: int) -> int:
    """Samples of an optimizer step, as the run file has them."""
    hyper = config.hyperparameters
    data = max(1, derive(config.data.topology, ranks).data)
    return hyper.per_device_batch * hyper.gradient_accumulation_steps * data


def reasons(found: list[Candidate]) -> Counter[str]:
    """How many are rejected for what, without the numbers that differ."""
    return Counter(one.reason.partition(":")[0] for one in found if one.reason)


def _candidates(config: RunConfig, shape: PlainShape, ranks: int, data: bool) -> Iterator[Candidate]:
    """Without a data set, packing makes no difference that a plan can see: then it is as in the run file."""
    packings = (True, False) if data else (config.data.packing,)
    layers = [n for n in _divisors(ranks) if n <= shape.num_hidden_layers]
    for pipeline, tensor in product(layers, _divisors(ranks)):
        if ranks % (pipeline * tensor) or shape.num_attention_heads % tensor:
            continue
        rest = ranks // pipeline
        for expert, expert_tensor in product(_divisors(rest), _divisors(rest)):
            if rest % (expert * expert_tensor):
                continue
            sizes = TopologySizes(tensor, pipeline, rest // tensor, expert, expert_tensor)
            for options in product(MICRO_BATCHES, RECOMPUTE, (False, True), packings):
                yield Candidate(sizes, *options)


def _judged(
    one: Candidate,
    config: RunConfig,
    base: Job,
    batch: int,
    gpu: Gpu,
    per_node: int,
    usable: float,
    dataset: Dataset | None,
) -> Candidate:
    quant, rows = config.quant if one.four_bits else None, one.samples * one.sizes.data
    if batch % rows:
        return replace(one, reason=f"the global batch cannot be cut: {batch} samples by {rows}")
    if reason := _misfit(base.shape, one.sizes, quant):
        return replace(one, reason=reason)
    try:
        dispatcher = choose_dispatcher(config.hyperparameters.parallelism.token_dispatcher, one.sizes)
    except ValueError as error:
        return replace(one, reason=f"token_dispatcher: it {error}")
    tensor, supervised = one.sizes.tensor, one.samples * base.length
    job = replace(
        base, sizes=one.sizes, dispatcher=dispatcher, tokens=-(-supervised // tensor) * tensor, supervised=supervised,
        samples=one.samples, micro_batches=batch // rows, recompute=one.recompute, quant=quant,
    )  # fmt: skip
    one = replace(one, micro_batches=job.micro_batches, peak=worst_rank(job).peak)
    if one.peak > usable:
        return replace(one, reason=f"memory: {one.peak / GiB:.1f} GiB of {usable / GiB:.1f}")
    mean = replace(dataset.fills(job, one.packing) if dataset else job, imbalance=1.0)
    parts, _ = step_parts(mean, gpu, per_node)
    tokens = mean.supervised * mean.micro_batches * one.sizes.data
    return replace(one, rate=tokens / sum(parts.values()) / job.world)


@lru_cache(4096)
def _misfit(shape: PlainShape, sizes: TopologySizes, quant: QuantSettings | None) -> str:
    """Why the model cannot be sharded so; "" where it can."""
    try:
        check_fits(shape, sizes, quant)
    except UserError as error:
        return f"the model cannot be sharded: {error}"
    return ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
