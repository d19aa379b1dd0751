"""Train a model with the full shape of Qwen3-Coder-30B-A3B with QLoRA in the memory of one machine.

    python benchmarks/full_depth.py [--layers 48] [--tokens 256] [--steps 2]

48 layers of 128 experts, hidden size 2048, vocabulary 151936; LoRA of rank 16 on q, k, v, o and the router; activation
checkpointing. Each matrix is drawn from a normal distribution, rounded to bf16 and quantized like a checkpoint's, so
that the 61 GB of bf16 weights never exist, in memory or on disk. Prints the peak resident memory, the bytes of
everything that stays between steps, the seconds of each phase and the tokens per second.
"""

import os
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

if not sys.warnoptions:  # `python -W default` shows what other libraries warn of
    warnings.simplefilter("ignore")

import torch
import typer
from machine import describe
from rich.console import Console
from rich.table import Table
from workload import Shape

from megasft import host
from megasft.adapters.model_io import initialize_adapter
from megasft.config.parallelism import resolve_topology
from megasft.config.schema import RunConfig
from megasft.data.dataset import Samples
from megasft.distributed.topology import derived_seed, join_world, leave_world
from megasft.model.qwen3_moe import Qwen3Moe, build_model
from megasft.quant import nf4
from megasft.quant.weight import QuantizedWeight, Slot, workspace_bytes
from megasft.storage.shards import Shard
from megasft.train.optimizer import optimizer_state_bytes
from megasft.train.trainer import Trainer

LIMIT_GIB = 22


def main(
    layers: Annotated[int, typer.Option(min=1, help="of the 48")] = 48,
    tokens: Annotated[int, typer.Option(min=2, help="in an optimizer step")] = 256,
    steps: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = len(os.sched_getaffinity(0)),
) -> None:
    """Build the model, train it and print the figures."""
    torch.set_num_threads(threads)
    shape = Shape(2048, layers, 32, 4, 128, 128, 8, 768, 151936, conversations=1, length=tokens)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal clock
        host.synchronize()
        seconds[phase], clock = time.perf_counter() - clock, time.perf_counter()
        print(f"{phase}: {seconds[phase]:.1f} s, {host.device_memory() / 2**30:.2f} GiB peak so far", flush=True)

    config = _settings(tokens, steps)
    topology = join_world(resolve_topology(config.data.topology, 1), config.job.seed)
    model = build_model(shape.hf_config(), topology, config.lora, torch.bfloat16, quant=config.quant)
    lap("build")
    draw(model, threads)
    initialize_adapter(model, config.job.seed)
    lap("draw and quantize")
    trainer = Trainer(config, topology, model, _samples(shape, steps))
    lap("optimizer")
    losses = []
    for step in range(1, steps + 1):
        losses.append(trainer.train_step()["loss"])
        lap(f"step {step}")
    report(trainer, seconds, tokens, losses)
    leave_world()


def _settings(tokens: int, steps: int) -> RunConfig:
    return RunConfig.from_dict(
        {
            "training": {"use_qlora": True},
            "lora": {"r": 16, "alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate"]},
            "hyperparameters": {"sequence_length": tokens, "max_steps": steps, "learning_rate": 1e-4},
        }
    )


def _samples(shape: Shape, steps: int) -> Samples:
    """One conversation of random tokens for each step, all of it supervised."""
    length = shape.length + 1  # the last token is only a target
    ids = torch.randint(shape.vocabulary, (steps * length,), generator=torch.Generator().manual_seed(0))
    return Samples(ids.int(), torch.ones(len(ids), dtype=torch.bool), torch.arange(1, steps + 1) * length)


def draw(model: Qwen3Moe, workers: int) -> None:
    """Initialize the base: norms with 1, the rest normal with standard deviation 0.02, one seed per matrix."""

    def fill(shard: Shard) -> None:
        generator = torch.Generator().manual_seed(derived_seed(0, shard.name))
        if len(shard.shape) == 1:
            shard.local.fill_(1.0)
        elif isinstance(shard.local, Slot):
            matrix = torch.empty(shard.shape).normal_(0, 0.02, generator=generator).bfloat16()
            shard.local.fill(nf4.quantize(matrix, shard.local.weight.settings, shard.name))
        else:
            for rows in shard.local.split(4096):
                rows.copy_(torch.empty(rows.shape).normal_(0, 0.02, generator=generator))

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(fill, model.base_shards()))
    torch.set_num_threads(threads)


def kept(trainer: Trainer) -> Counter[str]:
    """Bytes of everything that stays in memory between steps, by kind."""
    found: Counter[str] = Counter()
    inside: set[int] = set()
    for module in trainer.model.modules():
        if isinstance(module, QuantizedWeight):
            found["4-bit codes"] += module.packed.nbytes
            found["their scales"] += module.nbytes - module.packed.nbytes
            inside |= {id(buffer) for buffer in module.buffers()}
    for name, parameter in trainer.model.named_parameters():
        kind = (
            "adapters" if "lora_" in name else "embedding and head" if parameter.shape[0] > 10**5 else "router, norms"
        )
        found[kind] += parameter.nbytes
    found["other buffers"] = sum(b.nbytes for b in trainer.model.buffers() if id(b) not in inside)
    buffers = trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers
    found["gradients of the adapters"] = sum(buffer.grad_data.nbytes for buffer in buffers)
    found["optimizer states"] = optimizer_state_bytes(trainer.optimizer)
    found["workspace for a dequantized weight"] = workspace_bytes()
    return found


def report(trainer: Trainer, seconds: dict[str, float], tokens: int, losses: list[float]) -> None:
    """Print the figures."""
    console, found, peak = Console(width=100), kept(trainer), host.device_memory()
    weights = sum(
        module.shape[0] * module.shape[1] * module.shape[2]
        for module in trainer.model.modules()
        if isinstance(module, QuantizedWeight)
    )
    machine: dict[str, Any] = describe("bf16", 1)
    table = Table("memory", "GiB", title=f"{machine['processor']}, {machine['threads_per_rank']} threads, bf16")
    for kind, size in found.items():
        table.add_row(kind, f"{size / 2**30:.3f}")
    table.add_row("activations, libraries, the rest", f"{(peak - found.total()) / 2**30:.3f}")
    table.add_row(f"peak resident (limit {LIMIT_GIB})", f"{peak / 2**30:.3f}", style="bold")
    console.print(table)
    measured = (found["4-bit codes"] + found["their scales"]) / weights
    predicted = nf4.bytes_per_weight(trainer.config.quant)
    print(f"{weights:,} weights in 4 bits: {measured:.5f} bytes per weight; by the formula {predicted:.5f}")
    table = Table("phase", "seconds")
    for phase, value in seconds.items():
        table.add_row(phase, f"{value:.1f}")
    console.print(table)
    steps = [value for phase, value in seconds.items() if phase.startswith("step")]
    print(f"losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"{tokens / min(steps):.2f} tokens/s in the fastest of {len(steps)} steps of {tokens} tokens")


if __name__ == "__main__":
    typer.run(main)
