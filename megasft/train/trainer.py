"""The training loop."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.adapters.model_io import save_adapter
from megasft.config.schema import RunConfig
from megasft.data.dataset import Batches, Mix, Samples
from megasft.data.loader import Loader
from megasft.data.micro_batches import MicroBatches, Row, evaluation_rows
from megasft.distributed.topology import Topology, seed_step
from megasft.messages import UserError, say
from megasft.model.batch import MicroBatch
from megasft.model.hf_checkpoint import fingerprint
from megasft.model.hub import find_model
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.train.checkpoint import resume, run_lock
from megasft.train.checkpoint.async_writer import CheckpointWriter
from megasft.train.checkpoint.folder import RunState
from megasft.train.checkpoint.gate import Gate
from megasft.train.expert_load import ExpertLoad
from megasft.train.metrics import Metrics
from megasft.train.optimizer import step, wrap
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
        self.batches = global_batches(config, topology, self.train)
        self.device = host.device()  # asked here: the loader's thread has a current device of its own
        self.loader = Loader(self.train, self.batches, lambda rows: list(self._cut(self.train, rows)))
        self._plan(0)
        self.ddp, self.optimizer = wrap(model, hyper)
        self.load = ExpertLoad(model, hyper.router_aux_loss_coef)
        self.output_dir = Path(config.job.output_dir)
        self.saver = CheckpointWriter(config, model, self.optimizer, self.base_model, self.output_dir / "checkpoints")
        self.metrics: Metrics | None = None  # of rank 0, in `fit`
        self._doing, self._micro_batches, self._done_before = "", 0, 0  # for `progress`
        identity = resume.identity(config, _fingerprint(config), topology.sizes.data)
        self.state = RunState(loader=self.loader.state_dict(), identity=identity)  # changed within `gate.change` only
        self.gate = Gate(self._described)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def _plan(self, ahead: int) -> None:
        """How many steps there are and their learning rates, where the run is `ahead` of its place in the data.

        So it is where other data were put in the place of those of the first steps, and an epoch of them is shorter.
        """
        hyper = self.config.hyperparameters
        self._ahead = ahead
        self.total_steps = hyper.max_steps or ahead + self.batches.steps(hyper.n_epochs)
        self.schedule = Schedule(hyper.lr_schedule, hyper.learning_rate, self.total_steps, hyper.warmup_ratio)

    def _ends_epoch(self) -> bool:
        return self.batches.place(self.step - self._ahead)[1] == 0

    def fit(self, on_start: Callable[[], None] = lambda: None) -> Summary:
        """Train to the end, from the checkpoint that `[checkpoint] resume` names if there is one.

        Steps, validations, checkpoints, the adapter; `on_start` is called when `stop` may be, from another thread.
        Raises UserError where the checkpoint is of another run, and where too many steps in a row come to nothing.
        """
        started, losses, validation_loss = time.monotonic(), [], None
        with self.topology.together():
            if self.topology.is_first:
                run_lock.hold(self.output_dir)
        self.metrics = self._open_metrics(self._resume())
        tokens, due = self.state.tokens, False
        saved_at = time.monotonic()
        on_start()
        try:
            while True:
                if self.state.validated < self.step and self._validates_now():
                    validation_loss = self._validate()
                last = self.step >= self.total_steps
                due = due or last or self._ends_epoch() or self.step % self.config.checkpoint.every_steps == 0
                if due and self.step > self.state.saved:
                    self._checkpoint()
                    saved_at = time.monotonic()
                if last:
                    break
                record = self.train_step()
                if record["loss"] is not None:
                    losses.append(record["loss"])
                due = self._time_is_up(saved_at)
                self._heed_failed_save()
            self.saver.wait()
            self._heed_failed_save()
            self.save(self.output_dir / "adapter")
        except UserError:
            self.saver.wait()  # every rank comes here, and what is half written can still be whole
            raise
        finally:
            if self.metrics:
                self.metrics.close()
        run_lock.release(self.output_dir)
        return Summary(
            steps=self.step,
            train_loss=sum(losses[-10:]) / max(1, len(losses[-10:])),
            validation_loss=validation_loss,
            best_validation_loss=self.state.best,
            seconds=time.monotonic() - started,
            tokens=self.state.tokens - tokens,
            peak_memory_bytes=host.device_memory(),
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the next global batch; what a `train` line of metrics.jsonl says of it.

        Where the loss or the gradient is not finite, the step changes nothing but the count of steps, on every rank
        alike; its `loss` is None then.
        """
        host.synchronize()
        started = time.monotonic()
        self._begins(f"step {self.step + 1}")
        seed_step(self.topology, self.config.job.seed, self.step)
        batch = next(self.loader)
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, supervised = self._compute(batch.micro_batches, training=True)
        with self.gate.change(self.step + 1):
            grad_norm, updated = step(self.optimizer) if math.isfinite(loss) else (math.nan, False)
            host.synchronize()
            seconds = time.monotonic() - started
            state = self.state = replace(
                self.state,
                step=self.state.step + 1,
                updates=self.state.updates + updated,
                skipped=0 if updated else self.state.skipped + 1,
                tokens=self.state.tokens + batch.tokens,
            )
            record = {
                "loss": loss if updated else None,
                "lr": rate,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "tokens": batch.tokens,
                "supervised_tokens": supervised,
                "seconds": seconds,
                "data_wait": batch.waited,
                "tokens_per_second": batch.tokens / seconds,
                **self.load.report(),
            }
            if not updated:
                self._record("event", event="skipped", reason=f"loss {loss}, gradient norm {grad_norm}",
                             samples=batch.samples.tolist())  # fmt: skip
            if state.step % self.config.logging.every_steps == 0 or state.step == self.total_steps:
                self._record("train", **record)
            if state.step % self.config.logging.experts_every_steps == 0:
                self._record("experts", tokens=self.load.tokens.tolist())
        if state.skipped >= self.config.training.max_nonfinite_steps:
            raise UserError(
                f"stopped: loss or gradient of {state.skipped} steps in a row, the last of them step {state.step}, "
                f"was not finite; the samples of each are in {self.output_dir}/metrics.jsonl; lower [hyperparameters] "
                "learning_rate, look at the samples, and go on from a checkpoint before them"
            )
        return record

    def progress(self) -> tuple[int, str]:
        """A number that grows with all that is done, and what is being done; for another thread."""
        number = self._micro_batches - self._done_before
        return self._micro_batches + self.saver.written, self._doing + (f", micro batch {number}" if number else "")

    def _begins(self, doing: str) -> None:
        self._doing, self._done_before = doing, self._micro_batches

    def stop(self) -> Path:
        """Save the run as it stands after the last step that all ranks took, for another thread than that of `fit`.

        To be called on all ranks; the step under way is given up, and no other will be taken. Returns the checkpoint.
        Raises UserError where it cannot be written, RuntimeError where the ranks do not come to stand
        after the same step within a minute.
        """
        self.gate.hold()
        folder = self._save()
        if failure := self.saver.wait():
            raise UserError(f"{folder}: cannot be written ({failure})")
        return folder

    def evaluate(self, samples: Samples | Mix) -> tuple[float, int]:
        """(mean loss, supervised tokens) over all of `samples`, without dropout. Packed, whatever training does."""
        self._begins(f"the validation after step {self.step}")
        mix = Mix.of(samples)
        length = self.config.hyperparameters.sequence_length
        return self._run(mix, evaluation_rows(mix, length, self.topology.sizes.data), training=False)

    def save(self, folder: str | Path) -> None:
        """Write the adapters as they are now, in PEFT's format."""
        self._begins(f"writing {folder}")
        save_adapter(self.model, folder, self.base_model)

    def _cut(self, samples: Mix, rows: Sequence[Row]) -> MicroBatches:
        return MicroBatches(samples, rows, self.config.hyperparameters.per_device_batch, self.topology, self.device)

    def _run(self, samples: Mix, rows: Sequence[Row], training: bool) -> tuple[float, int]:
        """`_compute` on a global batch of these rows."""
        return self._compute(self._cut(samples, rows), training)

    def _compute(self, batches: MicroBatches | list[MicroBatch], training: bool) -> tuple[float, int]:
        """Forward, and backward if training, of a global batch: the mean loss and the number of supervised tokens."""
        self.ddp.train(training)
        self.load.start(batches, training)
        outcomes = get_forward_backward_func()(
            forward_step_func=self._forward,
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
        total = torch.cat([total, self.load.counted()])
        dist.all_reduce(total)
        self.load.settle(total[2:])
        loss_sum, tokens = total[:2].tolist()
        return loss_sum / max(1.0, tokens), int(tokens)

    def _forward(self, batches: Any, ddp: Any) -> tuple[Tensor, Any]:
        """megatron-core's forward step: the output, and what makes of it the loss, its tokens and the report."""
        batch: MicroBatch = next(batches)
        self._micro_batches += 1
        return ddp(batch), partial(_loss, batch)

    def _validates_now(self) -> bool:
        """Every eval_steps or at each epoch's end, and at the end of the run."""
        settings = self.config.training.validation
        if self.validation is None or not settings.enabled:
            return False
        strategy = settings.evaluation_strategy
        if strategy == "epoch" and self._ends_epoch():
            return True
        return (strategy == "steps" and self.step % settings.eval_steps == 0) or self.step == self.total_steps

    def _validate(self) -> float:
        assert self.validation is not None
        loss, tokens = self.evaluate(self.validation)
        best = math.isfinite(loss) and (self.state.best is None or loss < self.state.best)
        if best and self.config.training.validation.save_best_model_at_end:
            best = self._save_best(Mix.of(self.validation))
        with self.gate.change(self.step):
            self._record("validation", loss=loss if math.isfinite(loss) else None, tokens=tokens)
            self.state = replace(self.state, validated=self.step)
            if best:
                self.state = replace(self.state, best=loss, best_step=self.step)
        return loss

    def _save_best(self, validation: Mix) -> bool:
        """Write `best/`; where that fails, it stays as it was."""
        folder = self.output_dir / resume.BEST
        try:
            self.save(folder)
            with self.topology.together():
                if self.topology.is_first:
                    resume.label_best(folder, self.step, validation)
        except UserError as error:
            self._heed_failure("best", str(error))
            return False
        return True

    def _checkpoint(self) -> None:
        """Begin to save, after a line that says so and that the checkpoint already counts as written."""
        self._begins(f"the checkpoint after step {self.step}")
        with self.gate.change(self.step):
            self._record("checkpoint", path=str(self.saver.checkpoints.of(self.step)))
            self.state = replace(self.state, saved=self.step)
        self.gate.unless_held(self._save)

    def _save(self) -> Path:
        if self.metrics:
            self.metrics.sync()
        return self.saver.save(self.gate.rest)

    def _time_is_up(self, saved_at: float) -> bool:
        """Whether `every_minutes` have passed since the last checkpoint, by the clock of rank 0."""
        minutes = self.config.checkpoint.every_minutes
        if minutes is None:
            return False
        up = torch.tensor(float(time.monotonic() - saved_at > 60 * minutes), device=self.device)
        dist.broadcast(up, 0)
        return bool(up)

    def _heed_failed_save(self) -> None:
        """Make known that the last checkpoint could not be written."""
        failure = self.saver.failure
        if failure is not None:
            self.saver.failure = None  # only now: one that comes meanwhile is for the next time
            self._heed_failure("checkpoint", f"the last checkpoint could not be written ({failure})")

    def _heed_failure(self, what: str, failure: str) -> None:
        words = f"{failure}; what was written before is as it was"
        if self.config.checkpoint.on_failure == "stop":
            raise UserError(f"stopped: {words}")
        self._record("event", event=f"{what} failed", reason=failure)
        if self.topology.is_first:
            say(f"{words}, and training goes on")

    def _record(self, kind: str, **values: Any) -> None:
        if self.metrics:
            self.metrics.record(kind, self.step, **values)

    def _described(self) -> RunState:
        length = self.metrics.length if self.metrics else 0
        return replace(self.state, loader=self.loader.state_dict(), metrics_bytes=length)

    def _resume(self) -> int:
        """Go on from the checkpoint that the settings name, if there is one: how long metrics.jsonl was then."""
        found = resume.find(self.config, self.topology)
        changes: list[str] = []
        with self.topology.together():
            if found is not None:
                folder, state = found
                resume.refuse_changes(state.identity, self.state.identity, self.config, folder)
                changes = resume.changed_settings(folder, self.config)
                self.loader.load_state_dict(state.loader, "data" in self.config.checkpoint.allow_changed)
                self.saver.load(folder, state.step, state.updates)
        with self.topology.together():
            if self.topology.is_first:
                resume.tidy(self.config, found)
        if found is None:
            return 0
        if not self._best_stands(state):
            state = replace(state, best=None, best_step=0)
        self.state = replace(state, identity=self.state.identity)
        self.gate.rest = self._described()
        place = self.loader.state_dict()
        self._plan(self.step - self.batches.step_of(place["epoch"], place["row"]))
        if self.topology.is_first:
            for change in changes:
                say(f"resuming with another {change}")
            say(f"resuming from {folder}: {self.step} of {self.total_steps} steps are done")
            if self.step >= self.total_steps:
                say("nothing is left to train; for a new run name another [job] output_dir, or pass --resume never")
        return state.metrics_bytes if folder.parent == self.saver.checkpoints.folder.resolve() else 0

    def _best_stands(self, state: RunState) -> bool:
        """Whether later validations are to be held against that state's best."""
        if self.validation is None or not self.config.training.validation.save_best_model_at_end:
            return True
        found = [self.topology.is_first and resume.best_stands(self.output_dir, state, Mix.of(self.validation))]
        dist.broadcast_object_list(found)
        return bool(found[0])

    def _open_metrics(self, length: int) -> Metrics | None:
        metrics = None
        with self.topology.together():
            if self.topology.is_first:
                try:
                    self.output_dir.mkdir(parents=True, exist_ok=True)
                    (self.output_dir / ".config.toml").write_text(self.config.to_toml())
                    (self.output_dir / ".config.toml").rename(self.output_dir / "config.toml")
                    metrics = Metrics(self.output_dir, self.total_steps, self.step, length)
                except OSError as error:
                    raise UserError(
                        f"[job] output_dir: {self.output_dir} cannot be written ({error.strerror})"
                    ) from None
        return metrics


def global_batches(config: RunConfig, topology: Topology, samples: Mix) -> Batches:
    """Which of the samples each step of a run has."""
    hyper = config.hyperparameters
    size = hyper.per_device_batch * hyper.gradient_accumulation_steps * topology.sizes.data
    return Batches.over(samples, size, config.job.seed, hyper.sequence_length if config.data.packing else None)


def _fingerprint(config: RunConfig) -> str | None:
    """Of the base model, None where it is not read from files."""
    try:
        return fingerprint(find_model(config.job.model))
    except UserError:
        return None


def _loss(batch: MicroBatch, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (batch.labels >= 0).sum()
    return loss_sum, tokens.int(), torch.stack([loss_sum.detach().double(), tokens.double()])
