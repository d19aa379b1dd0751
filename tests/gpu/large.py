"""The 30B model: loading, memory against formulas, steps, presets, the reference job. All of it needs GPUs."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.gpu.jobs import COUNTED, note_counts
from tests.gpu.place import Place
from tests.gpu.report import NeedsMore

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "qwen3_coder_30b.toml"
LIMIT = 1500.0
# Counted in one rank's step of 4,096 tokens with recomputation on fake CUDA tensors (tests.support.fake_cuda.walk), never
# measured: peak GiB and kernels of a micro batch, at TP=2 x DP=2 with expert-TP=2, and on one GPU.
PEAK, PEAK_ALONE = 38.88, 72.47
KERNELS, KERNELS_ALONE = 5_510, 4_675


def _data(folder: Path) -> Path:
    """Conversations about this repository's own files, some 1,000 tokens each."""
    path = folder / "conversations.jsonl"
    lines = []
    for source in sorted((ROOT / "megasft").rglob("*.py")):
        text = source.read_text()
        for start in range(0, len(text), 3000):
            ask = {"role": "user", "content": f"Show {source.relative_to(ROOT)} from character {start}."}
            lines.append(json.dumps({"messages": [ask, {"role": "assistant", "content": text[start : start + 3000]}]}))
    path.write_text("\n".join(lines * 8) + "\n")
    return path


@dataclass
class Run:
    """What a run of the 30B left: the records of its steps, its output, seconds, and the peak memory of rank 0 in GiB."""

    records: list[dict]
    said: str
    seconds: float
    peak: float | None


def _train(
    place: Place,
    name: str,
    steps: int,
    *settings: str,
    ranks: int | None = None,
    command: Sequence[str] = ("-m", "megasft"),
) -> Run:
    """The reference run file with changes, on packed rows of this repository."""
    ranks, out = ranks or place.ranks, place.folder / name
    common = [
        f"job.model={place.model!r}", f"job.output_dir={str(out)!r}", f"hyperparameters.max_steps={steps}", "data.packing=true",
        "training.validation.enabled=false", "checkpoint.on_failure='stop'", f"compute.gpu_count={ranks}",
    ]  # fmt: skip
    if (gpu := os.environ.get("MEGASFT_GPU_TYPE")) is not None:
        common.append(f"compute.gpu_type={gpu!r}")
    words = [sys.executable, *command, "train", "--config", str(CONFIG), "--dataset", str(_data(place.folder))]
    words += [word for setting in (*common, *settings) for word in ("--set", setting)]
    begun = time.monotonic()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    place.note(f"{name}: exit code", done.returncode, 0, done.returncode == 0)
    path = out / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    peak = re.search(r"peak memory of rank 0\D+([\d.]+) GiB", done.stdout)
    steps_of = [record for record in records if record["kind"] == "train"]
    return Run(steps_of, done.stderr, time.monotonic() - begun, float(peak[1]) if peak else None)


def _topology(tensor: int, data: int, expert: int = 1, expert_tensor: int | None = None) -> str:
    sizes = {"tensor_parallel": tensor, "data_parallel": data, "expert_parallel": expert}
    sizes["expert_tensor_parallel"] = expert_tensor or (tensor if expert == 1 else 1)
    return f"data.topology={{{', '.join(f'{key} = {size}' for key, size in sizes.items())}}}"


def _fitting(ranks: int) -> str:
    """The reference topology, or what of it fits on fewer GPUs."""
    return _topology(min(2, ranks), max(1, ranks // 2))


def large(place: Place) -> None:
    """10 packed steps: losses that fall, time, memory, kernels and waits against what was counted without a GPU."""
    place.need(gpu=True, model=True)
    run = _train(
        place, "large", 10, _fitting(place.ranks), "hyperparameters.gradient_accumulation_steps=4",
        "hyperparameters.learning_rate=1e-4", "hyperparameters.warmup_ratio=0", command=[COUNTED],
    )  # fmt: skip
    losses = [record["loss"] for record in run.records]
    place.note(
        "losses", [round(loss, 3) for loss in losses], "10, falling", len(losses) == 10 and losses[-1] < losses[0]
    )
    place.note("seconds", _times(run), "recorded", True)
    _memory(place, run, PEAK if place.ranks > 1 else PEAK_ALONE)
    note_counts(place, place.folder / "large", KERNELS if place.ranks > 1 else KERNELS_ALONE)


def _times(run: Run) -> str:
    steps = sum(record["seconds"] for record in run.records)
    return f"{run.seconds:.0f}, of which {steps:.0f} in steps and the rest starting, loading and saving"


def _memory(place: Place, run: Run, planned: float) -> None:
    if run.peak is not None:
        place.note("peak GiB of rank 0", run.peak, f"{planned} within 10%", abs(run.peak / planned - 1) < 0.1)


def presets(place: Place) -> None:
    """Tokens per second and peak memory of layouts, 5 steps each; recorded, nothing is expected of them yet."""
    place.need(gpu=True, model=True)
    n = place.ranks
    layouts: dict[str, tuple[str, ...]] = {
        "reference": (_fitting(n),),
        "4-bit": (_fitting(n), "training.use_qlora=true"),
    }
    layouts["no recompute"] = (_fitting(n), "hyperparameters.parallelism.activation_checkpointing=false")
    layouts["TP1"] = (_topology(1, n),)
    if n > 1:
        layouts |= {"EP2": (_topology(2, n // 2, expert=2),), "expert TP1": (_topology(2, n // 2, expert_tensor=1),)}
    for name, settings in layouts.items():
        run = _train(place, name, 5, *settings, "hyperparameters.gradient_accumulation_steps=4")
        if rates := sorted(record["tokens_per_second"] for record in run.records[1:]):
            place.note(
                f"{name}: tokens per second, peak GiB", f"{rates[len(rates) // 2]:.0f}, {run.peak}", "recorded", True
            )


def reference(place: Place) -> None:
    """configs/qwen3_coder_30b.toml with packed rows, 5 steps of 128, TP=2 x DP=2."""
    place.need(ranks=4, gpu=True, model=True)
    run = _train(place, "reference", 5, ranks=4)
    place.equal("steps", len(run.records), 5)
    place.note("seconds", _times(run), "recorded", True)
    written = (place.folder / "reference" / "adapter" / "adapter_model.safetensors").exists()
    place.note("adapter", "written" if written else run.said[-300:], "written", written)
    _memory(place, run, PEAK)


VLLM = """
import sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, adapter, gpus = sys.argv[1:]
llm = LLM(model, enable_lora=True, max_lora_rank=16, tensor_parallel_size=int(gpus), max_model_len=2048)
asked = [{"role": "user", "content": "Show megasft/cli.py."}]
for lora in (None, LoRARequest("megasft", 1, adapter)):
    print(repr(llm.chat(asked, SamplingParams(temperature=0, max_tokens=32), lora_request=lora)[0].outputs[0].text))
"""


def vllm(place: Place) -> None:
    """vLLM loads an adapter of the 30B and answers otherwise than without it."""
    place.need(gpu=True, model=True)
    if find_spec("vllm") is None:
        raise NeedsMore("vLLM in this environment")
    _train(place, "served", 10, _fitting(place.ranks), "hyperparameters.gradient_accumulation_steps=1",
           "hyperparameters.learning_rate=1e-3", "hyperparameters.warmup_ratio=0")  # fmt: skip
    words = [sys.executable, "-c", VLLM, str(place.model), str(place.folder / "served" / "adapter"), str(place.ranks)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
    answers = done.stdout.splitlines()[-2:]
    place.note("answers without and with", answers or done.stderr[-300:], "two that differ", len(set(answers)) == 2)
