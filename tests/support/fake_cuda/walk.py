"""Take the steps of one rank of a job on fake GPUs, with megasft's own model, optimizer, trainer, saver and generation.

    python -m tests.support.fake_cuda.walk --layers 2 --tp 2 --world 4 [--help]

prints what each phase of a step of Qwen3-Coder-30B-A3B's shape counts. A process can walk many jobs of one world.
"""

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from megasft.config.values import Recompute
from tests.support.fake_cuda import process
from tests.support.fake_cuda.watch import Counts, Watch
from tests.support.state import held

RECOMPUTE: dict[str, Recompute] = {"true": True, "false": False, "selective": "selective"}


class Walk:
    """Makes this process walk jobs; make one in a process."""

    def __init__(self) -> None:
        self.watch = Watch()
        process.install(self.watch.sync)
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it took each job's collection most of a second

    @contextmanager
    def job(
        self,
        hf_config: Qwen3MoeConfig,
        settings: dict[str, Any],
        lengths: list[int],
        world: int = 1,
        rank: int = 0,
        transformer_engine: bool = True,
    ) -> Iterator["Job"]:
        """The job of a rank, with these settings of a run file and conversations of these lengths, all supervised."""
        process.join(world, rank)
        with process.transformer_engine(transformer_engine), self.watch.fake, self.watch:
            yield Job(self.watch, world, hf_config, settings, lengths)


class Job:
    """A job whose model and trainer are built. `phases` has the counts of each phase, under its name.

    While `without_rows`, no token chooses an expert of this rank.
    """

    without_rows = False

    def __init__(
        self, watch: Watch, world: int, hf_config: Qwen3MoeConfig, settings: dict[str, Any], lengths: list[int]
    ) -> None:
        from megasft.config.parallelism import resolve_topology
        from megasft.config.schema import RunConfig
        from megasft.data.dataset import Samples
        from megasft.distributed.topology import regroup
        from megasft.model.hf_config import DTYPES
        from megasft.model.qwen3_moe import build_model
        from megasft.quant import weight
        from megasft.train.trainer import Trainer

        weight._workspaces.clear()  # of the job before
        gc.collect()
        self.watch, self.phases, self.before = watch, dict[str, Counts](), watch.live
        self.config = config = RunConfig.from_dict(settings)
        hyper, parallel = config.hyperparameters, config.hyperparameters.parallelism
        with self.phase("model"):
            self.topology = regroup(resolve_topology(config.data.topology, world), 0)
            self.model = build_model(
                hf_config, self.topology, config.lora, DTYPES[config.dtype], parallel.activation_checkpointing,
                parallel.token_dispatcher, hyper.expert_capacity_factor, config.quant if config.training.use_qlora else None,
            )  # fmt: skip
        self._tell_sizes(max(lengths))
        count = len(lengths)
        ids = torch.randint(hf_config.vocab_size, (sum(lengths) + count,)).int()
        samples = Samples(ids, torch.ones(len(ids), dtype=torch.bool), (torch.tensor(lengths) + 1).cumsum(0))
        with self.phase("trainer"):
            self.trainer = Trainer(config, self.topology, self.model, samples)
        self.micro_batches: list[Any] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[Counts]:
        """Count what follows under this name."""
        with self.watch.phase() as counts:
            yield counts
        self.phases[name] = counts

    def train_step(self) -> dict[str, Any]:
        """One step of the trainer: phases "batch" (loading it), "compute" (its micro batches) and "update"."""
        compute = self.trainer._compute

        def counted(batches: Any, training: bool) -> Any:
            self.phases["batch"], self.micro_batches = self.watch.counts, list(batches)
            with self.phase("compute"):
                outcome = compute(batches, training)
            self.watch.counts = Counts(peak=self.watch.live)
            return outcome

        self.trainer._compute = counted  # type: ignore[method-assign]
        with self.watch.phase():
            record = self.trainer.train_step()
            self.phases["update"] = self.watch.counts
        self.phases["update"].live = self.watch.live
        self.trainer._compute = compute  # type: ignore[method-assign]
        return record

    def initialize(self) -> None:
        """Draw the adapters on the host: phase "adapters"."""
        from megasft.adapters.model_io import initialize_adapter

        with self.phase("adapters"):
            initialize_adapter(self.model, 0)

    def evaluate(self) -> None:
        """The loss of the conversations, without gradients: phase "evaluation"."""
        with self.phase("evaluation"):
            self.trainer.evaluate(self.trainer.train)

    def copy_states(self) -> None:
        """The part of a checkpoint that training waits for: phase "checkpoint"."""
        with self.phase("checkpoint"):
            self.trainer.writer._states.copy()

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy answer tokens: phase "generate"."""
        from megasft.generation.decode import generate

        with self.phase("generate"):
            return list(generate(self.model, prompt, tokens))

    def generate_many(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers to many prompts at once: phase "generate many"."""
        from megasft.generation.batch import generate_many

        with self.phase("generate many"):
            return generate_many(self.model, prompts, tokens)

    def made(self) -> list[tuple[int, int]]:
        """(tokens, supervised tokens) of each micro batch of the last step."""
        return [(len(batch.tokens), len(batch.supervised)) for batch in self.micro_batches]

    def state(self) -> dict[str, int]:
        """Bytes of what stays between steps, by kind."""
        return held(self.model, self.trainer)

    def _tell_sizes(self, longest: int) -> None:
        """Keep the answers of the device those of the micro batch that is computed."""
        config, sizes, answers = self.model.config, self.topology.sizes, self.watch.answers

        def entered(router: Any, args: Any) -> None:
            rows = args[0].shape[0] * args[0].shape[1]
            sent = rows * (config.moe_router_topk or 1)
            received = 0 if self.without_rows else sent
            answers.splits, answers.copies = (
                [sent, received, received * sizes.expert_tensor],
                received * sizes.expert_tensor,
            )

        for _, router in self.model.routers():
            router.register_forward_pre_hook(entered)
        answers.message = [longest // sizes.tensor, 1, config.hidden_size]


def qwen3_30b(layers: int = 48, **changes: Any) -> Qwen3MoeConfig:
    """Qwen3-Coder-30B-A3B's shape."""
    settings = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3MoeConfig(**(settings | changes))


def settings(
    tp: int = 1, ep: int = 1, etp: int = 0, pp: int = 1, tokens: int = 4096, accumulation: int = 2, dropout: float = 0.05,
    recompute: Recompute = True, quant: bool = False, dispatcher: str = "auto", folder: str = "/tmp", r: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """A run file: the reference job's, in another topology; experts are cut as the rest where `etp` is 0."""
    etp = etp or (tp if ep == 1 else 1)
    topology = {
        "tensor_parallel": tp, "expert_parallel": ep, "pipeline_parallel": pp, "expert_tensor_parallel": etp,
    }  # fmt: skip
    return {
        "job": {"output_dir": str(Path(folder) / "run"), "model": str(Path(folder) / "none")},
        "training": {"use_qlora": quant},
        "data": {"topology": topology},
        "lora": {"r": r, "alpha": 2 * r, "dropout": dropout, "target_modules": ["all-linear"]},
        "hyperparameters": {
            "sequence_length": tokens + 1, "max_steps": 9, "gradient_accumulation_steps": accumulation,
            "parallelism": {"activation_checkpointing": recompute, "token_dispatcher": dispatcher},
        },
    }  # fmt: skip


def main() -> None:
    """Print the counts of the second step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 2, "world": 4, "rank": 0, "tp": 2, "ep": 1, "etp": 0, "pp": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--dispatcher", default="auto")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="true")
    parser.add_argument("--quant", action="store_true")
    parser.add_argument("--sdpa", action="store_true", help="without Transformer Engine")
    parser.add_argument("--kernels", action="store_true", help="also list them")
    given = parser.parse_args()
    walk = Walk()
    run_file = settings(
        given.tp, given.ep, given.etp, given.pp, given.tokens, given.micro_batches, given.dropout,
        RECOMPUTE[given.recompute], given.quant, given.dispatcher,
    )  # fmt: skip
    rows = given.world // given.tp // given.pp * given.micro_batches
    with walk.job(
        qwen3_30b(given.layers), run_file, [given.tokens] * 3 * rows, given.world, given.rank, not given.sdpa
    ) as job:
        for _ in range(2):
            job.train_step()
        job.copy_states()
    for name, counts in job.phases.items():
        print(f"{name}: {counts}")
        if given.kernels:
            print("\n".join(f"  {n:6} {counts.bytes[op] / 1e9:8.2f} GB {op}" for op, n in counts.kernels.most_common()))


if __name__ == "__main__":
    main()
