"""The plan's time model beside figures that others have published for Qwen3-30B-A3B.

    python benchmarks/published.py

None of them is a run of megasft. Each row is planned in the megasft topology nearest to what was published, with the
constants of `plan.devices`, the same for all. Where all weights were trained, products take 6 FLOPs for each weight and
token instead of 4, and gradients of all weights are reduced once a step; nothing else is adapted.
"""

from dataclasses import dataclass, replace

from megasft.config.schema import RunConfig
from megasft.model.shape import RELEASED
from megasft.plan.devices import CONSTANTS, find_gpu
from megasft.plan.plan import make_plan
from megasft.plan.time import Time

SHAPE = RELEASED["Qwen3-30B-A3B"]
GiB = 2**30


@dataclass(frozen=True)
class Published:
    """tokens: per second and GPU; peak: GiB."""

    what: str
    gpu: str
    ranks: int
    length: int
    tokens: int
    peak: float | None = None
    expert_parallel: int = 8
    full: bool = False
    recompute: bool = True


ROWS = [
    Published("prime-rl, LoRA r=16", "H200", 8, 16384, 4596, 31.6),
    Published("prime-rl, LoRA r=16", "H200", 8, 65536, 3051, 63.7),
    Published("prime-rl, LoRA r=16", "H100", 8, 16384, 4137),
    Published("Megatron-Bridge, all weights", "H100", 16, 2048, 3395, expert_parallel=16, full=True, recompute=False),
    Published("Megatron-Bridge, pretraining", "H100", 16, 4096, 8655, expert_parallel=16, full=True, recompute=False),
    Published("Automodel, balance forced", "H100", 8, 4096, 12040, full=True, recompute=False),
]


def estimated(row: Published) -> tuple[float, float]:
    """(tokens per second and GPU, peak GiB)."""
    config = RunConfig.from_dict({
        "data": {"topology": {"expert_parallel": row.expert_parallel}},
        "hyperparameters": {
            "sequence_length": row.length + 1, "gradient_accumulation_steps": 8,
            "parallelism": {"activation_checkpointing": row.recompute},
        },
    })  # fmt: skip
    plan = make_plan(config, SHAPE, row.ranks, find_gpu(row.gpu), 8)
    time = _all_weights(plan.time, row) if row.full else plan.time
    return time.tokens_per_second, plan.memory.peak / GiB


def _all_weights(time: Time, row: Published) -> Time:
    gpu, parts = find_gpu(row.gpu), dict(time.parts)
    for name in ("experts' products", "other products", "loss head"):
        parts[name] *= 1.5
    experts = 3 * SHAPE.hidden_size * SHAPE.moe_intermediate_size * SHAPE.num_experts * SHAPE.num_hidden_layers
    held = 30.5e9 - experts + experts / row.expert_parallel
    rate = gpu.link if row.ranks <= 8 else gpu.network
    parts["gradients and weights of all"] = (4 + 2) * held / (rate * CONSTANTS.links)
    return replace(time, parts=parts)


def main() -> None:
    """Print the table, as Markdown."""
    print("| published | GPUs | tokens | tokens/s a GPU | estimated | error | peak GiB | computed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        rate, peak = estimated(row)
        memory = f"{row.peak} | {peak:.1f}" if row.peak else " | "
        print(
            f"| {row.what} | {row.ranks} x {row.gpu} | {row.length:,} | {row.tokens:,} | {rate:,.0f} | "
            f"{rate / row.tokens - 1:+.0%} | {memory} |"
        )


if __name__ == "__main__":
    main()
