"""The training loop."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasft import host
from megasft.adapters.model_io import is_zero, save_adapter
from megasft.config.schema import RunConfig
from megasft.data.dataset import Batches, Mix, Samples
from megasft.data.loader import Loader
from megasft.data.micro_batches import MicroBatches, Row, evaluation_rows
from megasft.distributed.topology import Topology, derived_seed
from megasft.messages import UserError
from megasft.model.batch import MicroBatch
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.train.checkpoint import resume, run_lock
from megasft.train.checkpoint.async_writer import CheckpointWriter
from megasft.train.checkpoint.best import BEST, label_best
from megasft.train.checkpoint.folder import RunState
from megasft.train.checkpoint.gate import Gate
from megasft.train.checkpoint.restore import Restored, restore
from megasft.train.early_signs import add_seen
from megasft.train.expert_load import ExpertLoad
from megasft.train.forward_backward import ForwardBackward, Totals
from megasft.train.observer import Observer, Outcome, validated
from megasft.train.optimizer import step, wrap
from megasft.train.progress import Progress
from megasft.train.schedule import Schedule
from megasft.train.summary import Summary
from megasft.train.validation_answers import ValidationAnswers


class Trainer:
    """Fine-tunes the adapters of a model that `megasft.build_model` made.

    The global batch is `per_device_batch * gradient_accumulation_steps * data_parallel` conversations, or with packing
    rows that hold several. The loss is the mean over all its supervised tokens.

    What a step, a validation or a checkpoint changes in the run's state, it changes within `gate.change`, so that
    `stop` can save the run between two changes from another thread.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        model: Qwen3Moe,
        train: Samples | Mix,
        validation: Samples | Mix | None = None,
        base_model: str | None = None,
        answers: ValidationAnswers | None = None,
    ) -> None:
        self.config, self.topology, self.model = config, topology, model
        self.train, self.validation = Mix.of(train), None if validation is None else Mix.of(validation)
        self.base_model = base_model or config.job.model
        if answers is None and self.validation is not None:
            answers = ValidationAnswers.prepare(config, topology, self.validation)
        self.answers = answers
        hyper = config.hyperparameters
        self.output_dir = Path(config.job.output_dir)
        self.device = host.device()  # asked here: the loader's thread has a current device of its own
        self.batches = global_batches(config, topology, self.train)
        self.loader = Loader(self.train, self.batches, lambda rows: list(self._cut(self.train, rows)))
        self.ddp, self.optimizer = wrap(model, hyper, lambda: self.observer.clock.part("reduce"))
        self.load = ExpertLoad(model, hyper.router_aux_loss_coef)
        self._compute = ForwardBackward(topology, self.ddp, self.load, hyper.sequence_length, self._see)
        self.observer = Observer(config, topology, model, self.optimizer, self.load)
        self.log = self.observer.log
        self.writer = CheckpointWriter(config, model, self.optimizer, self.base_model, self.output_dir / "checkpoints")
        self.progress = Progress(lambda: self.writer.parts_written)
        identity = resume.identity(config, resume.base_fingerprint(config), topology.sizes.data)
        measure = config.training.validation.measure
        self.state = RunState(loader=self.loader.state_dict(), identity=identity, measure=measure)
        self.gate = Gate(self._described)
        self.validation_loss: float | None = None  # of the last validation
        self._saved_at = time.monotonic()
        self._plan(0)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def fit(self, on_start: Callable[[], None] = lambda: None) -> Summary:
        """Train to the end, from the checkpoint that `[checkpoint] resume` names if there is one.

        `on_start` is called before the first step; from then on `stop` may be called from another thread. Raises
        UserError where the checkpoint is of another run, and where too many steps in a row are not finite.
        """
        started = time.monotonic()
        self._start()
        self.observer.start()
        first_step, first_token, losses = self.step, self.state.tokens, []
        on_start()
        try:
            self._validate_and_save()  # before the first step, or what was due when the run was interrupted
            while self.step < self.total_steps:
                losses.append(self.train_step()["loss"])
                self._validate_and_save()
            self.writer.wait()
            self._report_saves()
            self._refuse_zero_adapter()
            self.save(self.output_dir / "adapter")
        except UserError:
            self.writer.wait()  # every rank comes here, so a half-written checkpoint can still be completed
            raise
        finally:
            self.observer.stop()
        run_lock.release(self.output_dir)
        finite = [loss for loss in losses if loss is not None][-10:]
        return Summary(
            steps=self.step,
            trained=self.step - first_step,
            train_loss=sum(finite) / len(finite) if finite else None,
            validation_loss=self.validation_loss,
            best=self.state.best,
            seconds=time.monotonic() - started,
            tokens=self.state.tokens - first_token,
            peak_memory_bytes=host.device_memory(),
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the next global batch; returns its `train` line of metrics.jsonl.

        Where the loss or the gradient is not finite, the step changes nothing but the count of steps, on every rank
        alike; its `loss` is None then.
        """
        clock = self.observer.begin()
        self.progress.begin(f"step {self.step + 1}")
        self.model.dropout_seed = derived_seed(self.config.job.seed, "dropout", self.step)
        batch = next(self.loader)
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clock.part("compute")
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals = self._compute(batch.micro_batches, training=True)
        with self.gate.change(self.step + 1):
            clock.part("optimizer")
            grad_norm, updated = step(self.optimizer) if math.isfinite(totals.loss) else (math.nan, False)
            state = self.state = replace(
                self.state,
                step=self.state.step + 1,
                updates=self.state.updates + updated,
                skipped=0 if updated else self.state.skipped + 1,
                tokens=self.state.tokens + batch.tokens,
                experts_seen=add_seen(self.state.experts_seen, self.load.tokens),
            )
            last = state.step == self.total_steps
            record = self.observer.stepped(Outcome(state, batch, totals, rate, grad_norm, updated, self._epoch(), last))
            if self._ends_epoch():
                self.observer.epoch_ended(state)
                self.state = replace(state, experts_seen="")
        if state.skipped >= self.config.training.max_nonfinite_steps:
            raise UserError(
                f"stopped: loss or gradient was not finite in {state.skipped} steps in a row, the last of them step "
                f"{state.step}; their samples are listed in {self.output_dir}/metrics.jsonl; lower [hyperparameters] "
                "learning_rate, inspect the samples, and resume from an earlier checkpoint"
            )
        return record

    def validate(self) -> float:
        """Measure the validation loss, and answers if asked; record them; keep the best adapter in `best/`."""
        assert self.validation is not None
        settings = self.config.training.validation
        totals = self.evaluate(self.validation)
        measured = validated(totals)
        if self.answers:
            self.progress.begin(f"the answers of the validation after step {self.step}")
            measured |= self.answers.measure(self.model, self.progress.count_micro_batch)
        value = measured.get(settings.metric_for_best_model.removeprefix("val."))
        better = best = math.isfinite(totals.loss) and settings.is_better(value, self.state.best)
        if best and settings.save_best_model_at_end:
            with self.observer.clock.saving():
                best = self._save_best(self.validation)
        with self.gate.change(self.step):
            self.state = replace(self.state, validated=self.step, stale=0 if better else self.state.stale + 1)
            if best:
                self.state = replace(self.state, best=value, best_step=self.step)
            self.observer.validated(self.step, measured)
            if self._ended_early():
                self.observer.ended_early(self.state)
        self.validation_loss = totals.loss
        return totals.loss

    def checkpoint(self) -> None:
        """Start to write a checkpoint in the background, once the one before is on disk."""
        self.progress.begin(f"the checkpoint after step {self.step}")
        self.writer.wait()
        self._report_saves()
        with self.gate.change(self.step):
            self.state = replace(self.state, saved=self.step)
        self.gate.unless_held(self._save)
        self._saved_at = time.monotonic()

    def stop(self) -> Path:
        """Save the run as it is after the last step that all ranks took; called from another thread than `fit`'s.

        Every rank calls it. The step in progress is abandoned and no other is taken. Returns the checkpoint. Raises
        UserError where it cannot be written, RuntimeError where the ranks do not agree on a step within a minute.
        """
        self.gate.hold()
        self.writer.wait()
        self._record_saves()
        self.gate.rest = replace(self.gate.rest, metrics_bytes=self.log.length)
        folder = self._save()
        if failure := self.writer.wait():
            raise UserError(f"{folder}: cannot be written ({failure})")
        return folder

    def evaluate(self, samples: Samples | Mix) -> Totals:
        """Over all of `samples`, without dropout. Packed, whatever training does."""
        self.progress.begin(f"the validation after step {self.step}")
        mix = Mix.of(samples)
        length = self.config.hyperparameters.sequence_length
        return self._run(mix, evaluation_rows(mix, length, self.topology.sizes.data), training=False)

    def save(self, folder: str | Path) -> None:
        """Write the adapters as they are now, in PEFT's format."""
        self.progress.begin(f"writing {folder}")
        save_adapter(self.model, folder, self.base_model)

    def _refuse_zero_adapter(self) -> None:
        """Raise UserError where the run has trained nothing, so that it is never reported as done."""
        if is_zero(self.model):
            raise UserError(
                f"stopped after step {self.step} without an adapter: every lora_B is zero, so it would change nothing; "
                f"the learning rate was 0 or all steps were skipped, as `lr` and the events in {self.output_dir}/"
                "metrics.jsonl show; raise [hyperparameters] learning_rate or max_steps, and pass --resume never"
            )

    # --- before the first step ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Lock the output folder, resume if there is something to resume from, open the metrics."""
        with self.topology.together():
            if self.topology.is_first:
                run_lock.hold(self.output_dir)
        restored = self._resume()
        if restored is None:
            self.log.open(self.total_steps, 0, 0)
            return
        self.log.open(self.total_steps, self.step, self.state.metrics_bytes if restored.same_run else 0)
        if restored.same_run and self.state.saved == self.step:
            self.log.checkpoint(self.step, restored.folder)
        if self.step < self.total_steps:
            self.log.record("event", self.step, event="resumed", reason=f"from {restored.folder}")

    def _resume(self) -> Restored | None:
        """Fill weights, optimizer and state from the checkpoint to resume from, if there is one."""
        restored = restore(self.config, self.topology, self.state.identity, self.loader, self.writer, self.validation)
        if restored is None:
            return None
        self.state = restored.state
        self.gate.rest = self._described()
        place = self.loader.state_dict()
        self._plan(self.step - self.batches.step_of(place["epoch"], place["row"]))
        for change in restored.changes:
            self.log.say(f"resuming with another {change}")
        self.log.say(f"resuming from {restored.folder}: {self.step} of {self.total_steps} steps are done")
        more = "[hyperparameters] n_epochs or max_steps"
        if self._ended_early():
            more = "[training.validation] early_stopping_patience"
        if self.step >= self.total_steps:
            self.log.say(
                f"nothing is left to train; to train more raise {more}; for a new run name another [job] output_dir, "
                "or pass --resume never"
            )
        return restored

    def _plan(self, ahead: int) -> None:
        """Set the number of steps and their learning rates, for a run that is `ahead` steps of its place in the data.

        It is ahead where other data replaced those of the first steps and an epoch of them is shorter.
        """
        hyper = self.config.hyperparameters
        self._ahead = ahead
        self.total_steps = hyper.max_steps or ahead + self.batches.steps(hyper.n_epochs)
        self.schedule = Schedule(hyper.lr_schedule, hyper.learning_rate, self.total_steps, hyper.warmup_ratio)

    def _ended_early(self) -> bool:
        """Whether no validation has been the best for so long that the run ends, which it then does here."""
        patience = self.config.training.validation.early_stopping_patience
        over = self.validation is not None and patience is not None and self.state.stale >= patience
        if over:
            self.total_steps = self.step
        return over

    # --- between two steps -------------------------------------------------------------------------------------------

    def _validate_and_save(self) -> None:
        if self._validation_due():
            self.validate()
        with self.observer.clock.saving():
            if self._checkpoint_due():
                self.checkpoint()
            self._report_saves()

    def _validation_due(self) -> bool:
        """Every eval_steps or at each epoch's end, at the end of the run, and before the first step if asked."""
        settings = self.config.training.validation
        if self.validation is None or not settings.enabled or self.state.validated >= self.step:
            return False
        if self.step == 0:
            return settings.at_start
        strategy = settings.evaluation_strategy
        if strategy == "epoch" and self._ends_epoch():
            return True
        return (strategy == "steps" and self.step % settings.eval_steps == 0) or self.step == self.total_steps

    def _checkpoint_due(self) -> bool:
        """Every every_steps, at each epoch's end and at the end of the run, and when every_minutes have passed."""
        if self.step <= self.state.saved:
            return False
        ends = self.step >= self.total_steps or self._ends_epoch()
        return ends or self.step % self.config.checkpoint.every_steps == 0 or self._time_is_up()

    def _time_is_up(self) -> bool:
        """Whether `every_minutes` have passed since the last checkpoint, by the clock of rank 0."""
        minutes = self.config.checkpoint.every_minutes
        if minutes is None:
            return False
        up = torch.tensor(float(time.monotonic() - self._saved_at > 60 * minutes), device=self.device)
        dist.broadcast(up, 0)
        return bool(up)

    def _ends_epoch(self) -> bool:
        return self.batches.place(self.step - self._ahead)[1] == 0

    def _epoch(self) -> float:
        """Epochs trained so far."""
        epoch, row = self.batches.place(self.step - self._ahead)
        return epoch + (row / self.batches.global_batch / self.batches.steps_in(epoch) if row else 0.0)

    def _save(self) -> Path:
        self.log.sync()
        return self.writer.save(self.gate.rest)

    def _save_best(self, validation: Mix) -> bool:
        """Write `best/`; where that fails, it stays as it was."""
        folder = self.output_dir / BEST
        try:
            self.save(folder)
            with self.topology.together():
                if self.topology.is_first:
                    label_best(folder, self.step, validation)
        except UserError as error:
            self.log.failed("best", str(error), self.step)
            return False
        return True

    def _report_saves(self) -> None:
        """Record the checkpoints that have reached the disk since the last call, and those that failed."""
        if self.writer.has_outcome:
            with self.gate.change(self.step):
                failures = self._record_saves()
            for failure in failures:
                self.log.failed("checkpoint", f"the last checkpoint could not be written ({failure})", self.step)

    def _record_saves(self) -> list[str]:
        """Record checkpoints that are on disk; returns why others are not."""
        failures = []
        while outcome := self.writer.take_outcome():
            if outcome.failure is None:
                self.log.checkpoint(outcome.step, outcome.folder)
            else:
                failures.append(outcome.failure)
        return failures

    def _described(self) -> RunState:
        return replace(self.state, loader=self.loader.state_dict(), metrics_bytes=self.log.length)

    # --- a global batch ----------------------------------------------------------------------------------------------

    def _cut(self, samples: Mix, rows: Sequence[Row]) -> MicroBatches:
        return MicroBatches(samples, rows, self.config.hyperparameters.per_device_batch, self.topology, self.device)

    def _run(self, samples: Mix, rows: Sequence[Row], training: bool) -> Totals:
        """`_compute` on a global batch of these rows."""
        return self._compute(self._cut(samples, rows), training)

    def _see(self, batch: MicroBatch) -> None:
        """A micro batch enters the model."""
        self.progress.count_micro_batch()
        self.observer.fed += len(batch.tokens)


def global_batches(config: RunConfig, topology: Topology, samples: Mix) -> Batches:
    """Which of the samples each step of a run has."""
    hyper = config.hyperparameters
    size = hyper.per_device_batch * hyper.gradient_accumulation_steps * topology.sizes.data
    return Batches.over(samples, size, config.job.seed, hyper.sequence_length if config.data.packing else None)
