"""The cost of checkpointing: how much slower steps that save are, and the seconds until a checkpoint is on disk.

    python benchmarks/checkpoint.py --out result.json                           # an adapter of 500 MB
    python benchmarks/checkpoint.py --preset demo --rank 16 --accumulation 2    # the adapter of `make demo`

One rank, fp32: a checkpoint is three times the adapter's size (weights, two moments). A round is some steps without a
save, one with a save, and further steps until the checkpoint is on disk.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

if not sys.warnoptions:
    warnings.simplefilter("ignore")

import machine
import torch
from transformers import Qwen3MoeForCausalLM
from transformers.utils import logging
from workload import PRESETS, Shape, Workload

import megasft
from megasft.config.schema import RunConfig
from megasft.data.dataset import Samples

SHAPES = {"small": replace(PRESETS["small"], length=512), "demo": PRESETS["demo"]}
RANK = 464  # 128 M trained weights


def trainer(folder: Path, shape: Shape, r: int, accumulation: int) -> megasft.Trainer:
    """A trainer with a random model and random conversations."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(shape.hf_config()).save_pretrained(folder / "base")
    settings = Workload(shape, "fp32", 1, 0).settings(str(folder / "base"))
    settings["job"]["output_dir"] = str(folder / "run")
    settings["lora"] |= {"r": r, "alpha": float(r)}
    settings["hyperparameters"] |= {"gradient_accumulation_steps": accumulation, "max_steps": 10**6}
    settings["checkpoint"] = {"keep": 1}
    config = RunConfig.from_dict(settings)
    topology = megasft.initialize(config)
    length = shape.length + 1
    ids = torch.randint(0, shape.vocabulary, (64 * length,), dtype=torch.int32)
    data = Samples(ids, torch.ones(64 * length, dtype=torch.bool), torch.arange(1, 65) * length)
    return megasft.Trainer(config, topology, megasft.build_model(config, topology), data)


def measure(run: megasft.Trainer, rounds: int, plain: int) -> dict[str, Any]:
    """Seconds per step without a save, with one and while a checkpoint is written, and seconds until it is on disk."""
    without, saving, during, written = [], [], [], []
    run.train_step()
    for i in range(rounds + 1):
        for _ in range(plain):
            started = time.perf_counter()
            run.train_step()
            without.append(time.perf_counter() - started)
        started = time.perf_counter()
        run.train_step()
        begun = time.perf_counter()
        run.checkpoint()
        saving.append(time.perf_counter() - started)
        assert run.writer._pending is not None
        while not run.writer._pending.done():
            step = time.perf_counter()
            run.train_step()
            during.append(time.perf_counter() - step)
        run.writer.wait()
        assert not (failure := run.writer.wait()), failure
        written.append(time.perf_counter() - begun)
        print(
            f"without {without[-1]:.2f} s, saving {saving[-1]:.2f} s, on disk after {written[-1]:.2f} s",
            file=sys.stderr,
        )
        if not i:  # reported separately, because caches may be cold
            first = saving[0]
            without, saving, during, written = [], [], [], []
    folder = run.writer.checkpoints.of(run.state.saved)
    usual = statistics.median(without)
    return {
        "step_without_seconds": usual,
        "step_that_saves_seconds": statistics.median(saving),
        "step_that_saves_more": statistics.median(saving) / usual - 1,
        "first_step_that_saves_more": first / usual - 1,
        # None: every write ended before the next step
        "step_while_writing_seconds": statistics.median(during) if during else None,
        "step_while_writing_more": statistics.median(during) / usual - 1 if during else None,
        "until_on_disk_seconds": statistics.median(written),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def main() -> None:
    """Print the figures, and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="small", help="the model, and the micro batch")
    parser.add_argument("--rank", type=int, default=RANK, help="LoRA r; 464 makes an adapter of 500 MB")
    parser.add_argument("--accumulation", type=int, default=8, help="micro batches in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", type=int, default=3, help="steps without a save in a round")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="runs"))  # on the working directory's disk; /tmp may be in memory
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        figures = machine.describe("fp32", 1) | measure(
            trainer(folder, SHAPES[chosen.preset], chosen.rank, chosen.accumulation), chosen.rounds, chosen.plain
        )
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
