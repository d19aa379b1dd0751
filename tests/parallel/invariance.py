"""The same numbers under every topology. `python -m tests.parallel.invariance` prints the table that the test checks."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasft.config.values import LINEAR_LAYERS
from tests.parity.quantized import IN_BLOCKS
from tests.parity.reference import linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks
from tests.support.ranks import RankPool

R, STEPS, BATCH = 4, 10, 8
LENGTHS = [
    19,
    7,
    30,
    11,
    4,
    23,
    16,
    9,
    14,
    26,
    5,
    12,
    21,
    8,
    17,
    3,
    28,
    10,
    6,
    13,
]  # 20 samples: the last batch is of 4


@dataclass(frozen=True)
class Case:
    """A topology, and a split of the global batch of 8 into `BATCH / data / batch` micro batches of `batch` per rank."""

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
    Case(1, batch=8), Case(1, batch=2),
    Case(2), Case(2, tensor=2), Case(2, tensor=2, expert_tensor=2, batch=4), Case(2, expert=2), Case(2, tensor=2, expert=2),
    Case(2, expert_tensor=2), Case(2, pipeline=2, batch=2),
    Case(4, batch=2), Case(4, tensor=2, expert_tensor=2), Case(4, tensor=2), Case(4, tensor=4, batch=2),
    Case(4, tensor=4, expert_tensor=4), Case(4, tensor=4, expert_tensor=2, batch=4), Case(4, expert=4, batch=2), Case(4, expert=2),
    Case(4, tensor=2, expert=2, batch=4), Case(4, tensor=2, expert=4), Case(4, tensor=4, expert=2, expert_tensor=2),
    Case(4, tensor=2, expert=2, expert_tensor=2), Case(4, expert=2, expert_tensor=2, batch=2), Case(4, expert_tensor=4),
    Case(4, pipeline=2, batch=2), Case(4, pipeline=4), Case(4, tensor=2, pipeline=2, expert_tensor=2, batch=2),
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
    """A tiny model with random adapters and its reference numbers on one rank; with `qlora` over a 4-bit base."""

    def __init__(self, folder: Path, pool: RankPool, bf16: bool = False, qlora: bool = False, **changes: Any) -> None:
        self.config = tiny_config(num_hidden_layers=4, **(IN_BLOCKS if qlora else {}) | changes)
        self.folder, self.pool, self.bf16, self.qlora = folder, pool, bf16, qlora
        random_model(self.config).save_pretrained(folder / "base")
        write_adapter(random_adapter(self.config, R, frozenset(LINEAR_LAYERS)), folder / "adapter", R, 12.0)
        self.samples = on_ranks.random_samples(self.config.vocab_size, LENGTHS)
        self.alone = self.run(Case(1))

    def run(self, case: Case) -> dict[str, Any]:
        """Loss, gradients, loss curve and final adapter under a topology, gathered from all ranks."""
        settings = {
            "job": {"model": str(self.folder / "base"), "init_adapter": str(self.folder / "adapter"), "output_dir": str(self.folder)},
            "lora": {"r": R, "alpha": 12.0, "dropout": 0.0, "target_modules": LINEAR_LAYERS},
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
        for name, (n, k) in linear_shapes(self.config).items():
            shapes |= {f"{name}.lora_A.weight": (R, k), f"{name}.lora_B.weight": (n, R)}
        result = dict(answers[0])
        for kind in ("gradients", "adapter"):
            result[kind] = on_ranks.assemble([answer[kind] for answer in answers], shapes)
        return result

    def differences(self, case: Case) -> dict[str, float]:
        """The largest difference from one rank, relative to the largest entry of each tensor or curve."""
        got = self.run(case)
        return {
            "loss": abs(got["loss"] / self.alone["loss"] - 1),
            "gradients": max(
                _relative(got["gradients"][name], value) for name, value in self.alone["gradients"].items()
            ),
            "curve": _relative(torch.tensor(got["curve"]), torch.tensor(self.alone["curve"])),
            "norms": _relative(torch.tensor(got["norms"]), torch.tensor(self.alone["norms"])),
            "adapter": max(_relative(got["adapter"][name], value) for name, value in self.alone["adapter"].items()),
        }


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    warnings.filterwarnings("ignore")
    pool = RankPool()
    table = Table("topology", "loss", "gradients", "10-step curve", "gradient norms", "adapter", title="largest relative difference from one rank, fp32")  # fmt: skip
    for cases, qlora in ((CASES, False), (QLORA_CASES, True)):
        with tempfile.TemporaryDirectory() as folder:
            experiment = Experiment(Path(folder), pool, qlora=qlora)
            for case in cases:
                name = f"{case}, 4 bits" if qlora else str(case)
                table.add_row(name, *(f"{value:.1e}" for value in experiment.differences(case).values()))
    Console().print(table)


if __name__ == "__main__":
    main()
