"""Tokens per second of megasft's training step, alone or beside transformers + peft.

    python benchmarks/throughput.py --preset small --dtype bf16 --against hf
    python benchmarks/throughput.py --preset slice --dtype fp32 --vocabulary 2048 --steps 3 --against hf-best
    torchrun --nproc-per-node 4 benchmarks/throughput.py --preset small --tp 2

A step is `Trainer.train_step()`: forward, backward, gradient reduction, clipping and AdamW, on new tokens. With
--against, both sides start from the same weights and adapter, train on the same tokens and alternate in one process.
Their losses must agree at every step; otherwise the exit code is 1.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"
if not sys.warnoptions:  # `python -W default` shows the warnings of other libraries
    warnings.simplefilter("ignore")

import torch
import torch.distributed as dist
import typer
from machine import PROBE_SECONDS, PROBES, bf16_advice, describe, peak_of_body
from rich.console import Console
from rich.table import Table
from sides import Ours, Peer
from steps import Step, compare, side_figures
from transformers.utils import logging as transformers_logging
from workload import PRESETS, Workload

from megasft import host
from megasft.adapters.model_io import save_adapter
from megasft.config.schema import RunConfig
from megasft.distributed.topology import Topology, leave_world
from megasft.job import build_model, initialize
from megasft.messages import UserError
from megasft.model.hf_config import DTYPES
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.train.peak import GemmProbe
from megasft.train.trainer import Trainer

CLOCKS = (time.perf_counter, time.process_time)


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class Against(StrEnum):
    hf = "hf"
    hf_eager = "hf-eager"
    hf_best = "hf-best"


EXPERTS = {Against.hf: "grouped_mm", Against.hf_eager: "eager", Against.hf_best: "best"}


def main(
    preset: Annotated[str, typer.Option(help=f"the model: {', '.join(PRESETS)}")] = "small",
    dtype: Annotated[Dtype, typer.Option(help="of weights and activations")] = Dtype.bf16,
    vocabulary: Annotated[int | None, typer.Option(min=2, help="instead of the preset's")] = None,
    against: Annotated[
        Against | None,
        typer.Option(help="transformers + peft, alternating steps: grouped or eager experts, or what is fastest here"),
    ] = None,
    tp: Annotated[int, typer.Option(help="tensor parallel")] = 1,
    ep: Annotated[int, typer.Option(help="expert parallel")] = 1,
    etp: Annotated[int | None, typer.Option(help="expert-tensor parallel; default: --tp, or 1 with --ep")] = None,
    pp: Annotated[int, typer.Option(help="pipeline parallel; data parallel takes the other ranks")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="timed steps")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="untimed steps before them")] = 3,
    recompute: Annotated[bool, typer.Option(help="activation checkpointing, on both sides")] = False,
    deterministic: Annotated[
        bool, typer.Option(help="run megasft with [job] deterministic; compare with a run without it")
    ] = False,
    supervised: Annotated[float, typer.Option(min=0, max=1, help="share of the targets that is supervised")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="per rank; by default the cores, shared out")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    profile: Annotated[bool, typer.Option(help="print a CPU profile of one megasft step")] = False,
) -> None:
    """Time training steps on random weights and random tokens."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if against and world > 1:
        raise typer.BadParameter("--against compares in one process; run it without torchrun")
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    layout = {"tensor_parallel": tp, "expert_parallel": ep, "pipeline_parallel": pp}
    layout["expert_tensor_parallel"] = etp or (tp if ep == 1 else 1)
    shape = replace(PRESETS[preset], vocabulary=vocabulary or PRESETS[preset].vocabulary)
    workload = Workload(shape, dtype.value, steps, warmup, supervised, recompute, deterministic, layout)
    figures: dict[str, Any] = {"preset": preset, "machine": describe(dtype.value, world), "workload": asdict(workload)}
    try:
        topology = initialize(RunConfig.from_dict(workload.settings(model=".")))
        figures |= measure(workload, topology, against, profile)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks have the same error
            print(f"throughput: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if topology.is_first:
        report(figures)
        if advice := bf16_advice(dtype.value):
            print(advice)
        if json_file:
            json_file.write_text(json.dumps(figures, indent=2) + "\n")
    leave_world()
    if not figures.get("losses_agree", True):
        print("throughput: the losses of the two sides differ, so their times cannot be compared", file=sys.stderr)
        raise typer.Exit(1)


def measure(workload: Workload, topology: Topology, against: Against | None, profile: bool) -> dict[str, Any]:
    """All figures of a run. Every rank must call it."""
    replicas = topology.sizes.data
    with tempfile.TemporaryDirectory() as own:
        folder = Path(_from_first(own))
        if topology.is_first:
            workload.write_model(folder / "model")
        dist.barrier()
        config = RunConfig.from_dict(workload.settings(str(folder / "model")))
        model = build_model(config, topology)
        if against:
            fill_B(model)
            save_adapter(model, folder / "adapter")
        total = workload.warmup + workload.steps
        # One more step measures memory, and one is profiled.
        trainer = Trainer(config, topology, model, workload.samples(total + 2, replicas))
        sides: list[Ours | Peer] = [Ours(trainer)]
        if against:
            peer = Peer(folder / "model", folder / "adapter", trainer, EXPERTS[against])
            sides.append(peer)
        dist.barrier()

    # By wall time, and by CPU time, which other processes disturb less.
    shapes = (*PROBES, workload.expert_product)
    probes = [GemmProbe(DTYPES[workload.dtype], shapes, PROBE_SECONDS, clock) for clock in CLOCKS]
    taken: list[list[Step]] = [[] for _ in sides]
    for i in range(total):
        for probe in probes:
            probe.sample()
        for at in sorted(range(len(sides)), reverse=i % 2 == 1):  # alternate which side goes first
            taken[at].append(sides[at].step(trainer.batches[i].tolist()))

    tokens, flops = workload.tokens(replicas), workload.flops(replicas)
    rates, cpu_rates = torch.tensor([probe.rates() for probe in probes], dtype=torch.float64, device=host.device())
    dist.all_reduce(rates)
    dist.all_reduce(cpu_rates)
    work = flops.model + flops.recomputed
    limit, cpu_limit = work / float(rates.max()), work / float(cpu_rates.max()) * dist.get_world_size()
    expert = workload.expert_flops(replicas)
    of_experts = (work - expert) / float(rates.max()) + expert / float(rates[-1])
    cpu = torch.tensor([step.cpu_seconds for step in taken[0]], dtype=torch.float64, device=host.device())
    dist.all_reduce(cpu)
    taken[0] = [replace(step, cpu_seconds=seconds) for step, seconds in zip(taken[0], cpu.tolist(), strict=True)]
    figures: dict[str, Any] = {
        "topology": asdict(topology.sizes),
        "tokens_per_step": tokens,
        "flops_per_step": asdict(flops) | {"model": flops.model},
        "gemm_flops_per_second": {"x".join(map(str, p)): rate for p, rate in zip(shapes, rates.tolist(), strict=True)},
        "limit_seconds": limit,
        "limit_with_expert_products_seconds": of_experts,
        "cpu_limit_seconds": cpu_limit,
        "sides": {
            side.name: side_figures(steps, workload.warmup, tokens, flops.model, limit, cpu_limit)
            for side, steps in zip(sides, taken, strict=True)
        },
    }
    for side in sides:
        with peak_of_body() as peak:
            side.step(trainer.batches[total].tolist())
        figures["sides"][side.name] |= {"kept_bytes": side.kept_bytes(), "step_bytes": peak.bytes}
    figures["process_peak_bytes"] = host.device_memory()
    if against:
        figures["tried"] = peer.tried
        figures |= compare(taken[0], taken[1], workload.warmup, workload.dtype)
    if profile:
        with torch.profiler.profile() as profiler:
            sides[0].step(trainer.batches[total + 1].tolist())
        if topology.is_first:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))
    return figures


def fill_B(model: Qwen3Moe) -> None:
    """Replace the zeros of B with random values, so that the first loss depends on the adapter. One rank only."""
    generator = torch.Generator().manual_seed(2)
    for shard in model.adapter_shards():
        if shard.name.endswith("lora_B.weight"):
            shard.local.copy_(torch.randn(shard.shape, generator=generator) * 0.02)


def _from_first(value: str) -> str:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def report(figures: dict[str, Any]) -> None:
    """Print the figures as a table and a few lines."""
    machine, flops, sides = figures["machine"], figures["flops_per_step"], figures["sides"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{figures['preset']}, {machine['dtype']}: {figures['tokens_per_step']:,} tokens per step; "
        f"{machine['processor']}, {machine['ranks']} rank(s) of {machine['threads_per_rank']} thread(s)"
    )
    table = Table("", *sides)
    rows = {
        "tokens/s": lambda side: f"{side['tokens_per_second']:,.0f}",
        "step, median": lambda side: _ms(side["step_seconds"]["median"]),
        "  quartiles": lambda side: _range(side["step_seconds"], "lower_quartile", "upper_quartile", _ms),
        "  min - max": lambda side: _range(side["step_seconds"], "min", "max", _ms),
        "  forward and backward": lambda side: _ms(side["forward_backward_seconds"]),
        "  clipping, optimizer": lambda side: _ms(side["optimizer_seconds"]),
        "CPU time of all ranks": lambda side: _ms(side["cpu_seconds"]),
        "peak memory of rank 0": lambda side: _mib(side["kept_bytes"] + (side["step_bytes"] or 0)),
        "  kept between steps": lambda side: _mib(side["kept_bytes"]),
        "  within a step": lambda side: "?" if side["step_bytes"] is None else _mib(side["step_bytes"]),
        "model FLOP/s": lambda side: f"{side['flops_per_second'] / 1e9:,.1f} G",
        "share of the limit": lambda side: f"{side['share_of_limit']:.1%}",
        "  by CPU time": lambda side: f"{side['cpu_share_of_limit']:.1%}",
        "loss, first - last": lambda side: f"{side['losses'][0]:.6f} - {side['losses'][-1]:.6f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(side) for side in sides.values()))
    console.print(table)
    parts = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in flops.items() if name != "model")
    rates = ", ".join(f"{rate / 1e9:,.0f} G ({name})" for name, rate in figures["gemm_flops_per_second"].items())
    console.print(f"model FLOPs per step: {flops['model'] / 1e9:,.2f} G ({parts})")
    console.print(f"GEMM FLOP/s here: {rates}")
    console.print(f"limit, with all FLOPs at the higher of these rates: {_ms(figures['limit_seconds'])}")
    console.print(
        f"  with the experts' products at that of the last: {_ms(figures['limit_with_expert_products_seconds'])}"
    )
    for experts, found in figures.get("tried", {}).items():
        console.print(f"transformers + peft with {experts}, forward and backward: {found}")
    if "speed_ratio" in figures:
        speed, cpu = figures["speed_ratio"], figures["cpu_ratio"]
        quartiles, ends = ("lower_quartile", "upper_quartile"), ("min", "max")
        console.print(
            f"megasft is {_times(speed['median'])} times as fast (quartiles {_range(speed, *quartiles, _times)}, "
            f"min - max {_range(speed, *ends, _times)}); by CPU time {_times(cpu['median'])} times "
            f"(quartiles {_range(cpu, *quartiles, _times)})"
        )
        console.print(
            f"losses {'agree' if figures['losses_agree'] else 'DO NOT AGREE'}: largest relative difference at any step "
            f"{figures['loss_difference']:.1e} (gradient norms {figures['grad_norm_difference']:.1e})"
        )


def _range(values: dict[str, float], low: str, high: str, written: Callable[[float], str]) -> str:
    return f"{written(values[low])} - {written(values[high])}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    typer.run(main)
