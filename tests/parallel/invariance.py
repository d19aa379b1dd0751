"""The same numbers under every topology. `python -m tests.parallel.invariance` prints the table that the test checks."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from megasft.config.values import LINEAR_LAYERS
from tests.parity.quantized import IN_BLOCKS
from tests.parity.reference import linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks
from tests.support.ranks import RankPool

R, STEPS, BATCH, DROPOUT = 4, 3, 4, 0.1
LENGTHS = [19, 7, 30, 4, 23, 16, 14, 5, 12, 3]  # 10 samples: the last batch of an epoch has 2


@dataclass(frozen=True)
class Case:
    """A topology, and a split of a global batch of BATCH samples into `BATCH / data / batch` micro batches of `batch` per rank."""

    ranks: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    batch: int = 1
    dispatcher: str = "auto"

    def __str__(self) -> str:
        sizes = (
            ("tp", self.tensor),
            ("ep", self.expert),
            ("etp", self.expert_tensor),
            ("pp", self.pipeline),
            ("dp", self.data),
        )
        parts = [f"{name}{size}" for name, size in sizes if size > 1 or name == "dp"] + [f"micro{self.batch}"]
        return "-".join(parts + [self.dispatcher] * (self.dispatcher != "auto"))

    @property
    def data(self) -> int:
        return self.ranks // self.tensor // self.pipeline


CASES = [
    Case(1, batch=4), Case(1, batch=2),
    Case(2), Case(2, tensor=2), Case(2, tensor=2, expert_tensor=2, batch=4), Case(2, expert=2), Case(2, tensor=2, expert=2),
    Case(2, expert_tensor=2), Case(2, pipeline=2, batch=2),
    Case(4), Case(4, tensor=2, expert_tensor=2), Case(4, tensor=2), Case(4, tensor=4, batch=2),
    Case(4, tensor=4, expert_tensor=4), Case(4, tensor=4, expert_tensor=2, batch=4), Case(4, expert=4), Case(4, expert=2),
    Case(4, tensor=2, expert=2, batch=2), Case(4, tensor=2, expert=4), Case(4, tensor=4, expert=2, expert_tensor=2),
    Case(4, tensor=2, expert=2, expert_tensor=2), Case(4, expert=2, expert_tensor=2), Case(4, expert_tensor=4),
    Case(4, pipeline=2), Case(4, pipeline=4), Case(4, tensor=2, pipeline=2, expert_tensor=2, batch=2),
    Case(4, tensor=2, pipeline=2, expert=2), Case(4, pipeline=2, expert=2),
    # the dispatcher that "auto" does not choose
    Case(1, batch=4, dispatcher="alltoall"), Case(2, tensor=2, expert_tensor=2, dispatcher="alltoall"),
    Case(4, tensor=4, expert_tensor=2, batch=2, dispatcher="alltoall"), Case(2, tensor=2, expert=2, dispatcher="allgather"),
    Case(4, tensor=4, expert=2, expert_tensor=2, batch=2, dispatcher="allgather"), Case(4, tensor=2, expert=2, dispatcher="allgather"),
]  # fmt: skip

QLORA_CASES = [
    Case(1, batch=2), Case(2, tensor=2), Case(2, tensor=2, expert_tensor=2, batch=4), Case(2, expert=2), Case(2, pipeline=2),
    Case(4, tensor=4, expert=2, expert_tensor=2), Case(4, tensor=2, pipeline=2, expert=2),
]  # fmt: skip


class Experiment:
    """A tiny model with random adapters and its reference numbers on one rank; with `qlora` over a 4-bit base.

    It has a sparse and a dense layer, or two of each where layers are shared out between pipeline stages.
    """

    def __init__(self, folder: Path, pool: RankPool, bf16: bool = False, qlora: bool = False, **changes: Any) -> None:
        self.folder, self.pool, self.bf16, self.qlora = folder, pool, bf16, qlora
        self.changes = (IN_BLOCKS if qlora else {}) | changes
        self.samples = on_ranks.random_samples(tiny_config().vocab_size, LENGTHS)
        self._alone: dict[int, dict[str, Any]] = {}

    def _config(self, layers: int) -> Qwen3MoeConfig:
        return tiny_config(**({"num_hidden_layers": layers} | self.changes))

    def alone(self, layers: int) -> dict[str, Any]:
        """What `run` gives on one rank; makes the model and the adapter first."""
        if layers not in self._alone:
            config, folder = self._config(layers), self.folder / str(layers)
            random_model(config).save_pretrained(folder / "base")
            write_adapter(random_adapter(config, R, frozenset(LINEAR_LAYERS)), folder / "adapter", R, 12.0)
            self._alone[layers] = self.run(Case(1), layers)
        return self._alone[layers]

    def run(self, case: Case, layers: int) -> dict[str, Any]:
        """Loss, gradients, loss curve and final adapter under a topology, gathered from all ranks."""
        folder = self.folder / str(layers)
        settings = {
            "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder)},
            "lora": {"r": R, "alpha": 12.0, "dropout": DROPOUT, "target_modules": LINEAR_LAYERS},
            "training": {"use_qlora": self.qlora},
            "quant": {"cache_dir": str(self.folder / "cache")},
            "data": {"topology": {
                "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
                "pipeline_parallel": case.pipeline,
            }},
            "hyperparameters": {
                "per_device_batch": case.batch, "gradient_accumulation_steps": BATCH // (case.data * case.batch),
                "max_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 0.5, "adam_eps": 1e-5,
                "parallelism": {"bf16": self.bf16, "token_dispatcher": case.dispatcher},
            },
        }  # fmt: skip
        answers = self.pool(case.ranks, on_ranks.everything, settings, self.samples, STEPS)
        shapes = {}
        for name, (n, k) in linear_shapes(self._config(layers)).items():
            shapes |= {f"{name}.lora_A.weight": (R, k), f"{name}.lora_B.weight": (n, R)}
        result = dict(answers[0])
        for kind in ("gradients", "adapter"):
            result[kind] = on_ranks.assemble([answer[kind] for answer in answers], shapes)
        return result

    def differences(self, case: Case) -> dict[str, float]:
        """The largest difference from one rank, relative to the largest entry of each tensor or curve."""
        layers = 2 if case.pipeline == 1 else 4
        alone = self.alone(layers)
        got = self.run(case, layers)
        return {
            "loss": abs(got["loss"] / alone["loss"] - 1),
            "gradients": max(_relative(got["gradients"][name], value) for name, value in alone["gradients"].items()),
            "curve": _relative(torch.tensor(got["curve"]), torch.tensor(alone["curve"])),
            "norms": _relative(torch.tensor(got["norms"]), torch.tensor(alone["norms"])),
            "adapter": max(_relative(got["adapter"][name], value) for name, value in alone["adapter"].items()),
        }


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    warnings.filterwarnings("ignore")
    pool = RankPool()
    table = Table("topology", "loss", "gradients", f"{STEPS}-step curve", "gradient norms", "adapter", title=f"largest relative difference from one rank, fp32, dropout {DROPOUT}")  # fmt: skip
    for cases, qlora in ((CASES, False), (QLORA_CASES, True)):
        with tempfile.TemporaryDirectory() as folder:
            experiment = Experiment(Path(folder), pool, qlora=qlora)
            for case in cases:
                name = f"{case}, 4 bits" if qlora else str(case)
                table.add_row(name, *(f"{value:.1e}" for value in experiment.differences(case).values()))
    Console().print(table)


if __name__ == "__main__":
    main()
