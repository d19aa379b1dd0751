"""A plan as text, as JSON, and as a picture."""

from dataclasses import asdict
from html import escape
from typing import Any

from megasft.config.parallelism import TopologySizes
from megasft.config.values import Recompute
from megasft.plan.devices import CONSTANTS
from megasft.plan.job import Job
from megasft.plan.plan import CHARACTERS, Plan
from megasft.plan.search import Candidate, reasons

GiB = 2**30
COLORS = ("#4878a8", "#6f9fc8", "#9fc4e0", "#e08f3c", "#f0b878", "#5a9e5a", "#c8a2c8", "#a8a8a8", "#d0d0d0", "#806040")


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the text says, in bytes, seconds and FLOPs."""
    job, time = plan.job, plan.time
    return {
        "gpu": asdict(plan.gpu),
        "ranks": job.world,
        "topology": asdict(job.sizes),
        "dispatcher": job.dispatcher,
        "parameters": {"total": plan.parameters, "trained": plan.trained},
        "memory": {
            "state": plan.memory.state,
            "moments": plan.memory.moments,
            "worst": plan.memory.worst,
            "between_steps": plan.memory.between_steps,
            "peak": plan.memory.peak,
            "peak_imbalanced": plan.imbalanced.peak,
            "usable": plan.usable,
            "headroom": plan.headroom,
            "fits": plan.fits,
            "host": plan.host,
        },
        "step": {
            "tokens": time.tokens,
            "seconds": time.seconds,
            "parts": time.parts,
            "sent": time.sent,
            "tokens_per_second_per_gpu": time.tokens_per_second,
            "mfu": time.mfu,
            "flops_per_token": time.flops_per_token,
        },
        "checkpoint": plan.checkpoint,
        "steps": plan.steps,
        "hours": plan.hours,
        "kilowatt_hours": plan.kilowatt_hours,
        "constants": asdict(CONSTANTS) | {"imbalance": plan.imbalance},
    }


def as_text(plan: Plan) -> str:
    """Tables for the terminal."""
    return "\n".join([*_job(plan), "", *_memory(plan), "", *_step(plan), "", _assumed(plan)])


def one_line(plan: Plan) -> str:
    """The plan for a comment in a run file."""
    return (
        f"{plan.memory.between_steps / GiB:.1f} GiB between steps, {plan.memory.peak / GiB:.1f} at most, of "
        f"{plan.usable / GiB:.1f}; {plan.time.seconds:.1f} s a step, {plan.time.tokens_per_second:,.0f} tokens/s a GPU"
    )


def topology(sizes: TopologySizes) -> str:
    """The sizes on one line; of the experts where they are not as the rest."""
    experts = f", experts EP={sizes.expert} x expert-TP={sizes.expert_tensor}"
    return f"TP={sizes.tensor} x PP={sizes.pipeline} x DP={sizes.data}{experts}"


def _job(plan: Plan) -> list[str]:
    job, total, trained = plan.job, plan.parameters, plan.trained
    return [
        f"{job.world} x {plan.gpu.name}, {topology(job.sizes)} ({job.dispatcher}); micro batch of {job.tokens:,} "
        f"tokens, {RECOMPUTATION[job.recompute]} recomputation, {precision(job)}",
        "",
        f"{'parameters':<58} {'millions':>9} {'trained':>9}",
        *(f"  {kind:<56} {number / 1e6:9,.1f} {trained.get(kind, 0) / 1e6:9,.1f}" for kind, number in total.items()),
        f"  {'all':<56} {sum(total.values()) / 1e6:9,.1f} {sum(trained.values()) / 1e6:9,.1f}",
    ]


RECOMPUTATION: dict[Recompute, str] = {True: "with", False: "without", "selective": "with selective"}
RECOMPUTED: dict[Recompute, str] = {True: "full", False: "no", "selective": "selective"}


def precision(job: Job) -> str:
    """Of the base."""
    return "4-bit base" if job.quant else "bf16" if job.width == 2 else "fp32"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    return [
        "GiB of the rank that needs most",
        *(_line(name, size / GiB) for name, size in memory.state.items() if size),
        _line("between steps", memory.between_steps / GiB),
        *(_line(f"{memory.worst}: {name}", size / GiB) for name, size in memory.activations.items() if size),
        _line("peak", memory.peak / GiB),
        _line(f"peak, busiest experts {plan.imbalance:g} x the mean", plan.imbalanced.peak / GiB),
        _line(f"usable of {plan.gpu.memory / 1e9:.0f} GB", plan.usable / GiB),
        _line("headroom" if plan.fits else "DOES NOT FIT: missing", abs(plan.headroom) / GiB),
        _line("on the host, page-locked: a checkpoint's copy", plan.host / GiB),
        "  dropout stores no mask",
    ]


def _step(plan: Plan) -> list[str]:
    time = plan.time
    per_token = ", ".join(f"{name} {work / 1e9:.2f}" for name, work in time.flops_per_token.items() if work)
    links = ", ".join(f"{group} {size / 1e9:.2f}" for group, size in time.sent.items() if size > 1e6)
    lines = [
        "seconds of a step: estimated by roofline, not measured",
        *(_line(name, seconds) for name, seconds in time.parts.items() if seconds > 5e-4 * time.seconds),
        _line(f"step of {time.tokens:,} tokens", time.seconds),
        f"  {time.tokens_per_second:,.0f} tokens/s a GPU, MFU {time.mfu:.1%}",
        f"  GFLOP a token: {per_token}",
        *([f"  GB that a rank sends in a step: {links}"] if links else []),
        f"  a checkpoint takes {plan.checkpoint / 1e9:.2f} GB on disk",
    ]
    if plan.dataset is not None and plan.steps is not None:
        lines.append(
            f"  data: some {plan.dataset.tokens:,} tokens ({CHARACTERS:.0f} bytes each), {plan.steps:,} steps, "
            f"{plan.hours:.1f} h, {plan.kilowatt_hours:.0f} kWh of the GPUs"
        )
    return lines


def _assumed(plan: Plan) -> str:
    gpu, shares = plan.gpu, ", ".join(f"{name} {value:g}" for name, value in asdict(CONSTANTS).items())
    return (
        f"assumed: {gpu.flops / 1e12:.0f} TFLOP/s, HBM {gpu.hbm / 1e12:.2f} TB/s, link {gpu.link / 1e9:.0f} GB/s "
        f"within {plan.per_node} GPUs, network {gpu.network / 1e9:.0f} GB/s; shares reached: {shares}"
    )


def _line(name: str, value: float) -> str:
    return f"  {name:<76} {value:9.3f}"


def search_text(found: list[Candidate], gpus: str, plan: Plan | None, best: int = 10) -> str:
    """The fastest that fit `gpus`, beside what the run file says if that is for as many; why others are rejected, and
    the winner as lines to paste.
    """
    fitting = [one for one in found if not one.reason]
    lines = [
        f"{len(fitting)} of {len(found)} candidates fit {gpus}; tokens/s a GPU are estimates by roofline, not measured",
        "",
        f"{'tokens/s':>9} {'GiB':>6}  {'topology':<52} {'batch':>8}  recompute  base   packing",
        *(_candidate(one) for one in fitting[:best]),
    ]
    if plan:
        lines.append(f"{plan.time.tokens_per_second:9,.0f} {plan.imbalanced.peak / GiB:6.1f}  as the run file says")
    for kind, number in reasons(found).most_common():
        one = next(one.reason for one in found if one.reason.startswith(kind))
        lines.append(f"{number} rejected, {kind}, such as{one.removeprefix(kind)}".replace("such as:", "such as"))
    if not fitting:
        return "\n".join([*lines, "", "nothing fits; add GPUs, or shorten [hyperparameters] sequence_length"])
    return "\n".join([*lines, "", "the fastest, as lines of the run file:", "", fitting[0].lines()])


def _candidate(one: Candidate) -> str:
    batch, base = f"{one.samples} x {one.micro_batches}", "4-bit" if one.four_bits else "whole"
    flags = f"{RECOMPUTED[one.recompute]:<9}  {base:<5}  {'yes' if one.packing else 'no'}"
    return f"{one.rate:9,.0f} {one.peak / GiB:6.1f}  {topology(one.sizes):<52} {batch:>8}  {flags}"


def as_svg(plans: dict[str, Plan]) -> str:
    """Stacked bars of the memory at the peak, in GiB, one for each plan."""
    bars = {
        name: {kind: size / GiB for kind, size in (plan.memory.state | plan.memory.activations).items() if size}
        for name, plan in plans.items()
    }
    usable = max(plan.usable for plan in plans.values()) / GiB
    scale = 520 / max([usable, *(sum(bar.values()) for bar in bars.values())])
    kinds = list(dict.fromkeys(kind for bar in bars.values() for kind in bar))
    colors = {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(kinds)}
    height = 40 * len(bars) + 20 * len(kinds) + 50
    style = 'font-family="sans-serif" font-size="12"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" {style}>']
    for row, (name, bar) in enumerate(bars.items()):
        y, x = 20 + 40 * row, 170.0
        out.append(f'<text x="160" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        for kind, size in bar.items():
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="24" fill="{colors[kind]}">'
                f"<title>{kind}: {size:.2f} GiB</title></rect>"
            )
            x += size * scale
        out.append(f'<text x="{x + 4:.1f}" y="{y + 16}">{sum(bar.values()):.1f} GiB</text>')
    x = 170 + usable * scale
    end = 20 + 40 * len(bars)
    out.append(f'<line x1="{x:.1f}" y1="10" x2="{x:.1f}" y2="{end}" stroke="#c00" stroke-dasharray="4 3"/>')
    for row, kind in enumerate(kinds):
        y = 40 * len(bars) + 30 + 20 * row
        out.append(f'<rect x="170" y="{y}" width="12" height="12" fill="{colors[kind]}"/>')
        out.append(f'<text x="190" y="{y + 10}">{kind}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
