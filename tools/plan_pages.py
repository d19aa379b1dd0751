"""Write the tables and pictures of docs/reference-job.md and docs/scaling.md from plans.

    python tools/plan_pages.py

A table stands between `<!-- plan: NAME -->` and `<!-- end -->`; tests/unit/test_plan_pages.py holds the pages to it.
"""

import re
from pathlib import Path

from megasft.config.schema import RunConfig, load_config
from megasft.model.shape import RELEASED
from megasft.plan import report
from megasft.plan.devices import find_gpu
from megasft.plan.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
GB, GiB = 1e9, 2**30
H200 = find_gpu("H200")
REFERENCE = {
    "bf16, TP=2 x DP=2": "qwen3_coder_30b",
    "4-bit, TP=2 x DP=2": "qwen3_coder_30b_qlora",
    "bf16, TP=1 x DP=4": "qwen3_coder_30b_fast",
}
# (model, GPUs, tensor, pipeline and expert parallel, micro batch, recomputation, 4-bit base): what `--search` ranks
# first, with a global batch of 128 samples, or one for each GPU. Expert-TP is 1 in all of them.
SCALING = [
    ("Qwen3-Coder-30B-A3B", 4, 1, 1, 1, 2, False, False),
    ("Qwen3-Coder-30B-A3B", 16, 1, 1, 1, 2, False, False),
    ("Qwen3-Coder-30B-A3B", 64, 1, 1, 8, 2, False, False),
    ("Qwen3-Coder-30B-A3B", 256, 1, 1, 8, 1, False, False),
    ("Qwen3-Coder-30B-A3B", 1024, 1, 1, 8, 1, False, False),
    ("Qwen3-235B-A22B", 8, 1, 1, 8, 1, False, True),
    ("Qwen3-235B-A22B", 16, 1, 1, 8, 1, False, True),
    ("Qwen3-235B-A22B", 64, 1, 1, 8, 1, False, True),
    ("Qwen3-235B-A22B", 256, 1, 1, 8, 1, False, True),
    ("Qwen3-235B-A22B", 1024, 1, 1, 8, 1, False, True),
    ("Qwen3-Coder-480B-A35B", 16, 2, 2, 8, 1, False, False),
    ("Qwen3-Coder-480B-A35B", 64, 2, 1, 8, 1, False, True),
    ("Qwen3-Coder-480B-A35B", 256, 2, 1, 8, 1, False, True),
    ("Qwen3-Coder-480B-A35B", 1024, 2, 1, 8, 1, False, True),
]


def reference_plans() -> dict[str, Plan]:
    """The plans of the reference job's run files."""
    return {
        name: make_plan(load_config(ROOT / "configs" / f"{file}.toml"), RELEASED["Qwen3-Coder-30B-A3B"], 4, H200, 4)
        for name, file in REFERENCE.items()
    }


def scaling_plans() -> dict[tuple[str, int], Plan]:
    """A plan for each row of SCALING."""
    found = {}
    for model, ranks, tensor, pipeline, expert, samples, recompute, four_bits in SCALING:
        sizes = {"tensor_parallel": tensor, "pipeline_parallel": pipeline, "expert_parallel": expert}
        config = RunConfig.from_dict({
            "data": {"topology": sizes},
            "training": {"use_qlora": four_bits},
            "hyperparameters": {
                "per_device_batch": samples,
                "gradient_accumulation_steps": max(128, ranks) * tensor * pipeline // (samples * ranks),
                "parallelism": {"activation_checkpointing": recompute},
            },
        })  # fmt: skip
        found[model, ranks] = make_plan(config, RELEASED[model], ranks, H200, 8)
    return found


def reference_table() -> str:
    """GB of a GPU, by kind."""
    plans = reference_plans()
    rows = {
        "frozen base": lambda p: p.memory.state["frozen weights"] + p.memory.state["4-bit weights"],
        "workspace for dequantization": lambda p: p.memory.state["dequantization workspace"],
        "adapters, bf16": lambda p: p.memory.state["adapters"],
        "gradients, fp32": lambda p: p.memory.state["gradients"],
        "optimizer states": lambda p: p.memory.state["optimizer states"],
        "a step needs at most, beside these": lambda p: sum(p.memory.activations.values()),
        "peak": lambda p: p.memory.peak,
    }
    lines = [f"| GB of a GPU | {' | '.join(plans)} |", f"| --- |{' --- |' * len(plans)}"]
    lines += [f"| {name} | {' | '.join(f'{of(p) / GB:.1f}' for p in plans.values())} |" for name, of in rows.items()]
    lines.append(f"| seconds of a step, estimated | {' | '.join(f'{p.time.seconds:.1f}' for p in plans.values())} |")
    rates = " | ".join(f"{p.time.tokens_per_second:,.0f}" for p in plans.values())
    return "\n".join([*lines, f"| tokens/s a GPU, estimated | {rates} |"])


def scaling_table() -> str:
    """What the search ranks first for each model and number of GPUs."""
    lines = [
        "| model | GPUs | topology | micro batch | base | peak GiB | tokens/s a GPU | of the fewest GPUs | in "
        "collectives | GB sent a GPU and step |",
        f"|{' --- |' * 10}",
    ]
    first: dict[str, float] = {}
    for (model, ranks), plan in scaling_plans().items():
        time, job = plan.time, plan.job
        base = first.setdefault(model, time.tokens_per_second)
        waits = sum(seconds for name, seconds in time.parts.items() if name.startswith("collectives"))
        lines.append(
            f"| {model} | {ranks:,} | {report.topology(job.sizes)} | {job.samples} x {job.micro_batches} | "
            f"{report.precision(job)} | {plan.imbalanced.peak / GiB:.0f} | {time.tokens_per_second:,.0f} | "
            f"{time.tokens_per_second / base:.0%} | {waits / time.seconds:.0%} | {sum(time.sent.values()) / GB:.0f} |"
        )
    return "\n".join(lines)


def pictures() -> dict[str, str]:
    """SVG by file name in docs/images."""
    return {
        "plan_reference.svg": report.as_svg(reference_plans()),
        "plan_scaling.svg": report.as_svg({f"{m.split('-')[-2]}, {n}": p for (m, n), p in scaling_plans().items()}),
    }


def filled(text: str) -> str:
    """A page with its tables made anew."""
    tables = {"reference": reference_table, "scaling": scaling_table}
    return re.sub(
        r"(<!-- plan: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + tables[found[2]]() + found[3],
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    """Write both pages and their pictures."""
    for page in ("reference-job.md", "scaling.md"):
        path = ROOT / "docs" / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, picture in pictures().items():
        (ROOT / "docs" / "images" / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
