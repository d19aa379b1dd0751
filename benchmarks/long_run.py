"""Leak check: memory, file descriptors, threads and step time over 2,000 tiny steps with a checkpoint every 50.

    python benchmarks/long_run.py

Exits with code 1 if memory grows by more than 1 MiB per 100 steps after warm-up, or if descriptors or threads grow.
"""

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

if not sys.warnoptions:
    warnings.simplefilter("ignore")

import torch
from transformers import Qwen3MoeForCausalLM
from transformers.utils import logging
from workload import PRESETS, Workload

import megasft
from megasft.config.schema import RunConfig
from megasft.data.dataset import Samples

SHAPE = PRESETS["tiny"]
LIMIT = 2**20  # bytes per 100 steps


def trainer(folder: Path, steps: int, every: int) -> megasft.Trainer:
    """A trainer with everything a run has: dropout, validation, checkpoints, metrics, TensorBoard."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(SHAPE.hf_config()).save_pretrained(folder / "base")
    settings = Workload(SHAPE, "fp32", 1, 0).settings(str(folder / "base"))
    settings["job"]["output_dir"] = str(folder / "run")
    settings["lora"] |= {"dropout": 0.1}
    settings["training"] = {"validation": {"enabled": True, "eval_steps": 100}}
    settings["hyperparameters"] |= {"max_steps": steps, "n_epochs": steps}
    settings["checkpoint"] = {"every_steps": every, "keep": 2}
    config = RunConfig.from_dict(settings)
    topology = megasft.initialize(config)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, SHAPE.length, (200,), generator=generator)
    ids = torch.randint(0, SHAPE.vocabulary, (int(lengths.sum()),), dtype=torch.int32, generator=generator)
    data = Samples(ids, torch.ones(len(ids), dtype=torch.bool), lengths.cumsum(0))
    held_out = Samples(ids[:200], torch.ones(200, dtype=torch.bool), torch.arange(1, 11) * 20)
    return megasft.Trainer(config, topology, megasft.build_model(config, topology), data, held_out)


def resident() -> int:
    """Resident anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def slope(values: list[int]) -> float:
    """Slope of the least-squares line, per index."""
    middle, mean = (len(values) - 1) / 2, statistics.mean(values)
    moment = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return moment / sum((i - middle) ** 2 for i in range(len(values)))


def main() -> None:
    """Print a line every 200 steps and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    memory: list[int] = []
    seconds: list[float] = []
    counts: list[tuple[int, int]] = []
    last = time.perf_counter()

    def look(run: megasft.Trainer, step=megasft.Trainer.train_step) -> dict:
        nonlocal last
        record = step(run)
        memory.append(resident())
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        if len(memory) % 200 == 0:
            typical = statistics.median(seconds[-200:])
            print(f"step {len(memory):5}: {memory[-1] / 2**20:7.1f} MiB, {counts[-1][0]} descriptors, "
                  f"{counts[-1][1]} threads, {1e3 * typical:.1f} ms per step", flush=True)  # fmt: skip
        return record

    megasft.Trainer.train_step = look  # type: ignore[method-assign,assignment]
    devnull, errors = open(os.devnull, "w"), sys.stderr  # noqa: SIM115
    try:
        run = trainer(folder, chosen.steps, chosen.every)
        gc.collect()
        sys.stderr = devnull
        run.fit()
    finally:
        sys.stderr = errors
        shutil.rmtree(folder)
    warm = len(memory) // 4
    growth = 100 * slope(memory[warm:])
    times = [statistics.median(seconds[part : part + 200]) for part in (warm, len(seconds) - 200)]
    descriptors, threads = (
        (max(c[i] for c in counts[warm : 2 * warm]), max(c[i] for c in counts[-warm:])) for i in (0, 1)
    )
    print(
        f"after {warm} steps: memory grows by {growth / 2**10:.1f} KiB per 100 steps; "
        f"descriptors {descriptors[0]} then {descriptors[1]}; threads {threads[0]} then {threads[1]}; "
        f"step {1e3 * times[0]:.1f} then {1e3 * times[1]:.1f} ms"
    )
    sys.exit(growth > LIMIT or descriptors[1] > descriptors[0] or threads[1] > threads[0])


if __name__ == "__main__":
    main()
