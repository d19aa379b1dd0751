"""Run directories with every kind of line that a run can write, of any length, made without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

START = 1_795_000_000.0
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = """\
[job]
model = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
data = "conversations.jsonl"
output_dir = "runs/made"

[lora]
r = 16
alpha = 32.0

[hyperparameters]
learning_rate = {rate}
max_steps = {steps}
"""


def make_run(folder: Path, steps: int = 200, seed: int = 0, finished: bool = True, experts: int = 32) -> Path:
    """Write config.toml, metrics.jsonl and, if it is finished, what is looked for of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(rate=1e-5 * (1 + seed), steps=steps if finished else 2 * steps))
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines(steps, seed, experts, 1.0 if finished else 0.5))
    if finished:
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def lines(steps: int, seed: int = 0, experts: int = 32, epochs: float = 1.0) -> list[dict[str, Any]]:
    """The records of a run with 8 ranks, 48 layers' experts now and then, and a few events."""
    random = np.random.default_rng(seed)
    share = np.arange(1, steps + 1) / steps
    loss = 0.55 + 0.1 * seed**0.5 + 1.3 * np.exp(-6 * share) + 0.06 * random.standard_normal(steps)
    loss[steps // 2] += 1.5
    speed = 52_000 * (1 + 0.03 * random.standard_normal(steps)) * (1 - 0.3 * ((share > 0.7) & (share < 0.72)))
    norm = np.exp(-1.2 + 0.3 * random.standard_normal(steps))
    found: list[dict[str, Any]] = []

    def add(kind: str, step: int, **values: Any) -> None:
        found.append({"kind": kind, "step": step, "time": round(START + 9.7 * step, 3), **values})

    every = max(1, steps // 40)
    for step in range(1, steps + 1):
        i = step - 1
        tokens = 480_000 + 1000 * (step % 17)
        seconds = tokens / speed[i]
        add("train", step, loss=float(loss[i]), token_accuracy=float(0.86 - 0.2 * (loss[i] - 0.55)),
            lr=1e-5 * (1 + seed) * min(1.0, share[i] / 0.03) * (1 - share[i]), grad_norm=float(norm[i]), epoch=float(epochs * share[i]),
            tokens=tokens, supervised_tokens=tokens // 3, padding_share=0.02, seconds=seconds,
            tokens_per_second=float(speed[i]), tokens_per_second_per_device=float(speed[i]) / 8,
            model_flops_per_second=float(speed[i]) * 2.1e9, mfu=float(speed[i]) * 2.1e9 / 9.89e14 * 3,
            data_wait=0.02, compute_seconds=seconds * 0.86, reduce_seconds=seconds * 0.08, optimizer_seconds=seconds * 0.03,
            checkpoint_seconds=0.6 if step % every == 0 else 0.0, memory_allocated=74e9, memory_reserved=91e9,
            memory_peak=88e9, rss=11e9, expert_imbalance=1.6 - 0.2 * float(share[i]), expert_imbalance_worst=2.9)  # fmt: skip
        if step % every == 0:
            add(
                "validation",
                step,
                loss=float(loss[i]) + 0.03,
                perplexity=float(np.exp(loss[i])),
                token_accuracy=0.85,
                tokens=900_000,
            )
            add("norms", step, parameters={m: {p: 2 + j + float(share[i]) for j, p in enumerate(PARTS)} for m in ("lora_A", "lora_B")},
                updates={m: {p: 1e-4 * (1 + j) * (1.01 - float(share[i])) for j, p in enumerate(PARTS)} for m in ("lora_A", "lora_B")})  # fmt: skip
            add("devices", step, utilization=[0.93] * 8, power=[612.0 + r for r in range(8)], temperature=[61.0] * 8,
                memory_used=[98e9] * 8, cpu_percent=[104.0] * 7 + [None])  # fmt: skip
            load = random.gamma(2 + 4 * share[i], size=(48, experts))
            add("experts", step, tokens=(load * 1000).astype(int).tolist())
        if step % (4 * every) == 0:
            add("checkpoint", step, path=f"runs/made/checkpoints/step-{step:06d}")
        if step == steps // 2 + 1:
            add(
                "event",
                step,
                event="loss_spike",
                reason=f"loss {loss[i]:.3f}, the median of the last 50 lines is 0.621",
            )
    return found
