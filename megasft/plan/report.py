"""A plan as text, as JSON, and as a picture."""

from dataclasses import asdict
from typing import Any

from megasft.model.shape import weights
from megasft.plan.devices import CONSTANTS, IMBALANCE
from megasft.plan.plan import CHARACTERS, Plan

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
        "parameters": {"total": weights(job.shape), "trained": plan.trained},
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
            "tokens_per_second_per_gpu": time.tokens_per_second,
            "mfu": time.mfu,
            "flops_per_rank": asdict(time.flops),
        },
        "checkpoint": plan.checkpoint,
        "steps": plan.steps,
        "constants": asdict(CONSTANTS) | {"imbalance": IMBALANCE},
    }


def as_text(plan: Plan) -> str:
    """Tables for the terminal."""
    job, time, sizes = plan.job, plan.time, plan.job.sizes
    lines = [
        f"{weights(job.shape) / 1e9:.2f} billion weights, {plan.trained / 1e6:.1f} million trained; {job.world} x "
        f"{plan.gpu.name}, TP={sizes.tensor} x PP={sizes.pipeline} x DP={sizes.data}, experts: EP={sizes.expert} x "
        f"expert-TP={sizes.expert_tensor} ({job.dispatcher})",
        f"micro batch of {job.tokens:,} tokens, {'with' if job.recompute else 'without'} recomputation, "
        f"{'4-bit base' if job.quant else 'bf16' if job.width == 2 else 'fp32'}",
        "",
        "GiB of the rank that needs most",
        *(_line(name, size / GiB) for name, size in plan.memory.state.items() if size),
        _line("between steps", plan.memory.between_steps / GiB),
        *(_line(f"{plan.memory.worst}: {name}", size / GiB) for name, size in plan.memory.activations.items() if size),
        _line("peak", plan.memory.peak / GiB),
        _line(f"peak, busiest experts {IMBALANCE} x the mean", plan.imbalanced.peak / GiB),
        _line(f"of {plan.gpu.memory / 1e9:.0f} GB usable", plan.usable / GiB),
        _line("headroom" if plan.fits else "DOES NOT FIT, missing", abs(plan.headroom) / GiB),
        _line("host memory, page-locked, for checkpoints", plan.host / GiB),
        "",
        "estimate of a step, by roofline; not measured",
        *(_line(name, seconds, "s") for name, seconds in time.parts.items() if seconds > 5e-4 * time.seconds),
        _line("step", time.seconds, "s"),
        f"{time.tokens_per_second:,.0f} tokens/s a GPU, MFU {time.mfu:.1%}; {time.flops.model / 1e12:,.0f} TFLOP a rank"
        f" and step, and {time.flops.recomputed / 1e12:,.0f} of recomputation",
        f"a checkpoint takes {plan.checkpoint / 1e9:.2f} GB on disk",
    ]
    if plan.dataset is not None and plan.steps is not None:
        hours = plan.steps * time.seconds / 3600
        energy = hours * job.world * plan.gpu.watts * CONSTANTS.power / 1000
        lines.append(
            f"data: {plan.dataset.tokens:,} tokens at {CHARACTERS:.0f} bytes each, {plan.steps:,} steps, {hours:.1f} h, "
            f"{energy:.0f} kWh of the GPUs"
        )
    constants = ", ".join(f"{name} {value:g}" for name, value in asdict(CONSTANTS).items())
    data_sheet = plan.gpu
    lines += [
        "",
        f"assumed: {data_sheet.flops / 1e12:.0f} TFLOP/s, HBM {data_sheet.hbm / 1e12:.2f} TB/s, link "
        f"{data_sheet.link / 1e9:.0f} GB/s within {plan.per_node} GPUs, network {data_sheet.network / 1e9:.0f} GB/s; "
        f"shares reached: {constants}",
    ]
    return "\n".join(lines)


def _line(name: str, value: float, unit: str = "") -> str:
    return f"  {name:<58} {value:9.3f} {unit}".rstrip()


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
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    for row, (name, bar) in enumerate(bars.items()):
        y, x = 20 + 40 * row, 170.0
        out.append(f'<text x="160" y="{y + 16}" text-anchor="end">{name}</text>')
        for kind, size in bar.items():
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="24" fill="{colors[kind]}">'
                f"<title>{kind}: {size:.2f} GiB</title></rect>"
            )
            x += size * scale
        out.append(f'<text x="{x + 4:.1f}" y="{y + 16}">{sum(bar.values()):.1f} GiB</text>')
    x = 170 + usable * scale
    out.append(
        f'<line x1="{x:.1f}" y1="10" x2="{x:.1f}" y2="{20 + 40 * len(bars)}" stroke="#c00" stroke-dasharray="4 3"/>'
    )
    for row, kind in enumerate(kinds):
        y = 40 * len(bars) + 30 + 20 * row
        out.append(f'<rect x="170" y="{y}" width="12" height="12" fill="{colors[kind]}"/>')
        out.append(f'<text x="190" y="{y + 10}">{kind}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
