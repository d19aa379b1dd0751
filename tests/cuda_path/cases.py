"""The jobs that the tests walk, all in one process: `python -m tests.cuda_path.cases FILE` pickles what each counted."""

import os
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

from megasft.config.schema import RunConfig
from megasft.model.shape import RELEASED
from megasft.plan.job import Job
from tests.support.fake_cuda.walk import settings

R, TOKENS = 8, 64
PACKED = [13, 30, 7, 21, 9, 28, 5, 17]


@dataclass(frozen=True)
class Case:
    """A rank of a job. `changes` are of `walk.settings`, `lengths` of its conversations, TOKENS each by default. The
    counts are those of the last of its `steps`.
    """

    name: str
    world: int = 4
    rank: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (TOKENS,) * 16
    model: dict[str, Any] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    transformer_engine: bool = True
    without_rows: bool = False
    steps: int = 1
    full: str = ""  # a released model at its true size, instead of a small one

    def config(self) -> Qwen3MoeConfig:
        return released(self.full) if self.full else small(**self.model)

    def settings(self, folder: str) -> dict[str, Any]:
        made = settings(**({"tokens": TOKENS, "r": R, "folder": folder, "accumulation": 1} | self.changes))
        if not self.full:
            made["lora"]["target_modules"] = ["all-linear", "gate"]
        made["hyperparameters"] |= self.hyper
        return made

    def job(self) -> Job:
        """As the plan sees it."""
        return Job.of(RunConfig.from_dict(self.settings("/tmp")), self.config(), self.world).of_rank(self.rank)

    def __str__(self) -> str:
        return self.name


def released(name: str) -> Qwen3MoeConfig:
    """A model of `megasft.model.shape.RELEASED`."""
    rope = {"rope_type": "default", "rope_theta": 1e7}
    return Qwen3MoeConfig(**asdict(RELEASED[name]) | {"norm_topk_prob": True, "rope_parameters": rope})


def small(**changes: Any) -> Qwen3MoeConfig:
    """Two layers, one of them dense where asked; sizes that 4-bit blocks and two expert-tensor ranks divide."""
    sizes = {
        "vocab_size": 1003, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3MoeConfig(**(sizes | changes))


TP2 = {"tp": 2}
EP2 = {"tp": 2, "ep": 2}
CASES = [
    Case("tp2-dp2", changes=TP2 | {"accumulation": 2}, steps=2),
    Case("tp2-dp2 rank 3", rank=3, changes=TP2),
    Case("tp2-dp2, no recomputation, no dropout", changes=TP2 | {"recompute": False, "dropout": 0.0}),
    Case("tp2-dp2, selective", changes=TP2 | {"recompute": "selective", "accumulation": 2}),
    Case("tp2-dp2, all-to-all", changes=TP2 | {"dispatcher": "alltoall"}),
    Case("tp2-dp2, experts whole", changes=TP2 | {"etp": 1}),
    Case("tp2-dp2, experts whole, all-to-all", changes=TP2 | {"etp": 1, "dispatcher": "alltoall"}),
    Case("tp2-ep2", changes=EP2),
    Case("tp2-ep2, all-gather", changes=EP2 | {"dispatcher": "allgather"}),
    Case("tp2-ep2, no row", changes=EP2, without_rows=True),
    Case("tp2-ep2, all-gather, no row", changes=EP2 | {"dispatcher": "allgather"}, without_rows=True),
    Case("ep4", changes={"ep": 4}),
    Case("dp4"),
    Case("one GPU", world=1),
    Case("tp2-pp2, first stage", changes=TP2 | {"pp": 2}),
    Case("tp2-pp2, last stage", rank=3, changes=TP2 | {"pp": 2}),
    Case("tp2-pp2, first stage, selective", changes=TP2 | {"pp": 2, "recompute": "selective"}),
    Case("packed", changes=TP2, lengths=PACKED * 3, hyper={"per_device_batch": 3}),
    Case("dense layer", changes=TP2, model={"mlp_only_layers": [1]}),
    Case("dense layer, selective", changes=TP2 | {"recompute": "selective"}, model={"mlp_only_layers": [1]}),
    Case("balancing loss", changes=TP2, hyper={"router_aux_loss_coef": 0.1}),
    Case("capacity", changes=TP2, hyper={"expert_capacity_factor": 1.0}),
    Case("without Transformer Engine", changes=TP2, lengths=PACKED * 3, hyper={"per_device_batch": 3},
         transformer_engine=False),
    Case("4-bit tp2-dp2", changes=TP2 | {"quant": True}, steps=2),
    Case("4-bit tp2-ep2", changes=EP2 | {"quant": True}),
    Case("4-bit one GPU", world=1, changes={"quant": True, "dropout": 0.0}),
]  # fmt: skip


_30B = "Qwen3-Coder-30B-A3B"
FULL = Case("reference job", changes=TP2 | {"tokens": 4096, "r": 16}, lengths=(4096,) * 8, steps=2, full=_30B)
# Released models at their true sizes, with few tokens.
SHAPES = [
    Case(name, world, rank, changes | {"r": 16}, (TOKENS,) * 2 * world, full=model)
    for name, model, world, rank, changes in [
        ("30B dp4", _30B, 4, 0, {}),
        ("30B ep4", _30B, 4, 1, {"ep": 4}),
        ("30B tp2-dp2", _30B, 4, 3, TP2),
        ("30B tp2-pp2, first stage", _30B, 4, 0, TP2 | {"pp": 2}),
        ("30B tp2-pp2, last stage", _30B, 4, 3, TP2 | {"pp": 2}),
        ("30B 4-bit", _30B, 4, 0, TP2 | {"quant": True}),
        ("235B", "Qwen3-235B-A22B", 32, 9, {"tp": 4, "ep": 8}),
        ("480B", "Qwen3-Coder-480B-A35B", 64, 40, {"tp": 8, "ep": 8, "pp": 2}),
    ]
]


@dataclass
class Walked:
    """What one case counted. `phases`: of its last step; `state`: bytes of what stays, by kind; `made`: micro batches;
    `peak`: bytes of the step at most.
    """

    phases: dict[str, Any]
    state: dict[str, int]
    live: int
    made: list[tuple[int, int]]
    peak: int = 0
    error: str = ""


def in_a_process(path: Path, *names: str) -> dict[str, Walked]:
    """What the cases of these names counted, by default all small ones, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.cuda_path.cases", str(path), *names],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return pickle.loads(path.read_bytes())


def walk_all(path: str, names: list[str]) -> None:
    import traceback

    from tests.support.fake_cuda.walk import Walk

    walk, found = Walk(), {}
    for case in [FULL, *SHAPES, *CASES] if names else CASES:
        if names and case.name not in names:
            continue
        with walk.job(case.config(), case.settings(path + ".run"), list(case.lengths), case.world, case.rank,
                      case.transformer_engine) as job:  # fmt: skip
            job.without_rows = case.without_rows
            try:
                if case.steps > 1 and not case.full:
                    job.initialize()
                for _ in range(case.steps):
                    job.train_step()
                job.copy_states()
                if case.world == 1:
                    job.evaluate()
                    job.generate(list(range(1, 20)), 3)
                    job.generate_many([list(range(1, 50)), list(range(1, 60)), [5, 6, 7]], 3)
            except Exception:
                found[case.name] = Walked({}, {}, 0, [], error=traceback.format_exc())
                continue
            peak = max(job.phases[phase].peak for phase in ("batch", "compute", "update")) - job.before
            found[case.name] = Walked(job.phases, job.state(), walk.watch.live - job.before, job.made(), peak)
        del job
    with open(path, "wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    from tests.cuda_path import cases  # whose classes the reader of the file finds

    cases.walk_all(sys.argv[1], sys.argv[2:])
