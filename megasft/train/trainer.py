"""The training loop."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.config import RunConfig
from megasft.data.dataset import Batches, Mix, Samples
from megasft.data.loader import Loader
from megasft.data.micro_batches import MicroBatches, Row, evaluation_rows
from megasft.errors import UserError
from megasft.lora.adapter import save_adapter
from megasft.model.qwen3_moe import MicroBatch, Qwen3Moe
from megasft.topology import Topology
from megasft.train.metrics import Metrics
from megasft.train.optimizer import wrap
from megasft.train.schedule import Schedule


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    steps: int
    train_loss: float
    validation_loss: float | None
    best_validation_loss: float | None
    seconds: float
    tokens: int
    peak_memory_bytes: int


class Trainer:
    """Fine-tunes the adapters of a model that `megasft.build_model` made.

    The global batch is `per_device_batch * gradient_accumulation_steps * data_parallel` conversations, or with packing
    rows that hold several, the loss the mean over all its supervised tokens.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        model: Qwen3Moe,
        train: Samples | Mix,
        validation: Samples | Mix | None = None,
        base_model: str | None = None,
    ) -> None:
        self.config, self.topology, self.model = config, topology, model
        self.train, self.validation = Mix.of(train), validation
        self.base_model = base_model or config.job.model
        hyper = config.hyperparameters
        global_batch = hyper.per_device_batch * hyper.gradient_accumulation_steps * topology.sizes.data
        row_length = hyper.sequence_length if config.data.packing else None
        self.batches = Batches.over(self.train, global_batch, config.job.seed, row_length)
        self.device = host.device()  # asked here: the loader's thread has a current device of its own
        self.loader = Loader(self.train, self.batches, lambda rows: list(self._cut(self.train, rows)))
        self.total_steps = hyper.max_steps or self.batches.steps(hyper.n_epochs)
        self.schedule = Schedule(hyper.lr_schedule, hyper.learning_rate, self.total_steps, hyper.warmup_ratio)
        self.ddp, self.optimizer = wrap(model, hyper)
        self.step = 0
        self.tokens = 0
        self.best: float | None = None
        self.output_dir = Path(config.job.output_dir)

    def fit(self) -> Summary:
        """Train to the end: steps, validations, checkpoints, the adapter."""
        started, checkpoint, logging = time.monotonic(), self.config.checkpoint, self.config.logging
        metrics = self._open_metrics()
        losses: list[float] = []
        validation_loss = None
        try:
            while self.step < self.total_steps:
                record = self.train_step()
                losses.append(record["loss"])
                if metrics and (self.step % logging.every_steps == 0 or self.step == self.total_steps):
                    metrics.record("train", self.step, **record)
                if self._validates_now():
                    validation_loss = self._validate(metrics)
                if self.step % checkpoint.every_steps == 0 and self.step < self.total_steps:
                    self._checkpoint(metrics)
            self.save(self.output_dir / "adapter")
        finally:
            if metrics:
                metrics.close()
        return Summary(
            steps=self.step,
            train_loss=sum(losses[-10:]) / max(1, len(losses[-10:])),
            validation_loss=validation_loss,
            best_validation_loss=self.best,
            seconds=time.monotonic() - started,
            tokens=self.tokens,
            peak_memory_bytes=host.device_memory(),
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the next global batch; what a `train` line of metrics.jsonl says of it."""
        host.synchronize()
        started = time.monotonic()
        batch = next(self.loader)
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, supervised = self._compute(batch.micro_batches, training=True)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step + 1} is {loss}; lower the learning rate?")
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        host.synchronize()
        seconds = time.monotonic() - started
        self.tokens += batch.tokens
        return {
            "loss": loss,
            "lr": rate,
            "grad_norm": float(grad_norm),
            "tokens": batch.tokens,
            "supervised_tokens": supervised,
            "seconds": seconds,
            "data_wait": batch.waited,
            "tokens_per_second": batch.tokens / seconds,
        }

    def evaluate(self, samples: Samples | Mix) -> tuple[float, int]:
        """(mean loss, supervised tokens) over all of `samples`, without dropout. Packed, whatever training does."""
        mix = Mix.of(samples)
        length = self.config.hyperparameters.sequence_length
        return self._run(mix, evaluation_rows(mix, length, self.topology.sizes.data), training=False)

    def save(self, folder: str | Path) -> None:
        """Write the adapters as they are now, in PEFT's format."""
        save_adapter(self.model, folder, self.base_model)

    def _cut(self, samples: Mix, rows: Sequence[Row]) -> MicroBatches:
        return MicroBatches(samples, rows, self.config.hyperparameters.per_device_batch, self.topology, self.device)

    def _run(self, samples: Mix, rows: Sequence[Row], training: bool) -> tuple[float, int]:
        """`_compute` on a global batch of these rows."""
        return self._compute(self._cut(samples, rows), training)

    def _compute(self, batches: MicroBatches | list[MicroBatch], training: bool) -> tuple[float, int]:
        """Forward, and backward if training, of a global batch: the mean loss and the number of supervised tokens."""
        self.ddp.train(training)
        outcomes = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=self.config.hyperparameters.sequence_length,
            micro_batch_size=1,
            forward_only=not training,
        )
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Every rank of a tensor-parallel group of the last stage holds the same sums; the first speaks for it.
        if outcomes and self.topology.groups.tp.rank() == 0:
            total += torch.stack(outcomes).sum(0)
        dist.all_reduce(total)
        loss_sum, tokens = total.tolist()
        return loss_sum / max(1.0, tokens), int(tokens)

    def _validates_now(self) -> bool:
        """Every eval_steps or at each epoch's end, and at the end of the run."""
        settings = self.config.training.validation
        if self.validation is None or not settings.enabled:
            return False
        strategy = settings.evaluation_strategy
        if strategy == "epoch" and self.batches.place(self.step)[1] == 0:
            return True
        return (strategy == "steps" and self.step % settings.eval_steps == 0) or self.step == self.total_steps

    def _validate(self, metrics: Metrics | None) -> float:
        assert self.validation is not None
        loss, tokens = self.evaluate(self.validation)
        if metrics:
            metrics.record("validation", self.step, loss=loss, tokens=tokens)
        if self.best is None or loss < self.best:
            self.best = loss
            if self.config.training.validation.save_best_model_at_end:
                self.save(self.output_dir / "best")
        return loss

    def _checkpoint(self, metrics: Metrics | None) -> None:
        """Write the adapter of this step beside the last `keep`."""
        folder = self.output_dir / "checkpoints" / f"step-{self.step:06d}"
        self.save(folder)
        if metrics:
            metrics.record("checkpoint", self.step, path=str(folder))
            kept = sorted(folder.parent.glob("step-*"))[: -self.config.checkpoint.keep]
            for old in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _open_metrics(self) -> Metrics | None:
        metrics = None
        with self.topology.together():
            if self.topology.is_first:
                try:
                    self.output_dir.mkdir(parents=True, exist_ok=True)
                    (self.output_dir / "config.toml").write_text(self.config.to_toml())
                    metrics = Metrics(self.output_dir, self.total_steps)
                except OSError as error:
                    raise UserError(
                        f"[job] output_dir: {self.output_dir} cannot be written ({error.strerror})"
                    ) from None
        return metrics


def _forward(batches: Any, ddp: Any) -> tuple[Tensor, Any]:
    """megatron-core's forward step: the model's output, and what makes of it the loss, its tokens and the report."""
    batch: MicroBatch = next(batches)
    return ddp(batch), partial(_loss, batch)


def _loss(batch: MicroBatch, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (batch.labels >= 0).sum()
    return loss_sum, tokens.int(), torch.stack([loss_sum.detach().double(), tokens.double()])
