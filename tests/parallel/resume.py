"""Resume a run under any topology. `python -m tests.parallel.resume` prints a table, from each of 6 topologies to each."""

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megasft.train.observer import LARGEST
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks
from tests.support.ranks import RankPool

BATCH, STEPS, EVERY = 4, 8, 3
CASES = [
    Case(1, batch=2), Case(4, tensor=2), Case(4), Case(4, expert=4),
    Case(4, tensor=2, pipeline=2, expert_tensor=2), Case(2, tensor=2, expert=2),
]  # fmt: skip


def fit(settings: dict[str, Any], samples: list[on_ranks.Sample], held_out: list[on_ranks.Sample]) -> None:
    """Train to the end."""
    config, topology, model = on_ranks.start(settings)
    Trainer(config, topology, model, on_ranks.as_samples(samples), on_ranks.as_samples(held_out)).fit()


class Runs:
    """Runs of one tiny job, each in its own folder."""

    def __init__(self, folder: Path, pool: RankPool, dropout: float = 0.0, bf16: bool = False, **changes: Any) -> None:
        self.folder, self.pool, self.dropout, self.bf16 = folder, pool, dropout, bf16
        self.config = tiny_config(**({"num_hidden_layers": 2} | changes))
        random_model(self.config).save_pretrained(folder / "base")
        # 10 samples in batches of 4: the third step of an epoch has 2, and step 3 ends an epoch.
        self.samples = on_ranks.random_samples(self.config.vocab_size, [5 + 7 * i % 23 for i in range(10)])
        self.held_out = self.samples[4:7]  # seen in training, so that its loss falls

    def run(self, case: Case, name: str, **settings: dict[str, Any]) -> Path:
        """Train under a topology and return the run's folder. `settings` replace or extend sections of the job."""
        self.pool(case.ranks, fit, self.settings(case, name, **settings), self.samples, self.held_out)
        return self.folder / name

    def settings(self, case: Case, name: str, **settings: dict[str, Any]) -> dict[str, Any]:
        """The run file of a run."""
        output = self.folder / name
        own = {
            "job": {"model": str(self.folder / "base"), "output_dir": str(output)},
            "lora": {"r": 4, "alpha": 12.0, "dropout": self.dropout, "target_modules": ["all-linear", "gate"]},
            "data": {"topology": {
                "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
                "pipeline_parallel": case.pipeline,
            }},
            "training": {"validation": {"enabled": True, "eval_steps": 2}},
            "hyperparameters": {
                "per_device_batch": case.batch, "gradient_accumulation_steps": BATCH // (case.data * case.batch),
                "max_steps": STEPS, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_eps": 1e-5,
                "warmup_ratio": 0.2, "n_epochs": 3, "parallelism": {"bf16": self.bf16},
            },
            "checkpoint": {"every_steps": EVERY, "keep": 9},
        }  # fmt: skip
        for section, values in settings.items():
            own[section] = own.get(section, {}) | values
        return own

    def resume_from(self, run: Path, step: int, case: Case, name: str, **settings: dict[str, Any]) -> Path:
        """Resume from a checkpoint of another run, as if that run had been killed right after writing it."""
        output = self.folder / name
        kept = output / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(run / "checkpoints" / kept.name, kept)
        shutil.copy(run / "metrics.jsonl", output / "metrics.jsonl")
        shutil.copytree(run / "tensorboard", output / "tensorboard")
        return self.run(case, name, **settings)


SPEED = ("seconds", "tokens_per_second", "tokens_per_second_per_device", "model_flops_per_second", "mfu")
MEASURED = ("time", "path", *SPEED, *LARGEST)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured and paths, sorted by step, because a checkpoint's line is written when it is on disk."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in records if record["kind"] == "train"]
    assert trained == sorted(set(trained)), "a step is in metrics.jsonl twice, or out of order"
    for record in records:
        for key in MEASURED:
            record.pop(key, None)
    records = [record for record in records if record["kind"] != "devices" and record.get("event") != "resumed"]
    return sorted(records, key=lambda record: (record["step"], record["kind"] == "checkpoint"))


def tensors(run: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint's safetensors files."""
    found = {}
    for path in sorted((run / "checkpoints" / checkpoint).glob("*.safetensors")):
        found |= load_file(path)
    assert found, f"no tensor in {run / 'checkpoints' / checkpoint} that could be compared"
    return found


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses and final adapters."""
    curves = [
        torch.tensor([line["loss"] for line in lines(run) if line["kind"] in ("train", "validation")])
        for run in (one, other)
    ]
    worst = float((curves[0] / curves[1] - 1).abs().max())
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        worst = max(worst, float((value - adapters[1][name]).abs().max() / value.abs().max().clamp_min(1e-12)))
    return worst


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    warnings.filterwarnings("ignore")
    title = f"resumed at step {EVERY} of {STEPS} in another topology: largest relative difference from the run without a break, fp32, dropout 0.1"
    table = Table("from / to", *map(str, CASES), title=title)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), RankPool(), dropout=0.1)
        whole = [runs.run(case, str(case)) for case in CASES]
        for before, run in zip(CASES, whole, strict=True):
            ended = [runs.resume_from(run, EVERY, after, f"{before} to {after}") for after in CASES]
            table.add_row(str(before), *(f"{difference(run, other):.1e}" for other in ended))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
