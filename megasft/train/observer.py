"""What a step says of itself: its `train` line, and those of kinds `norms`, `devices` and `experts`."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megasft import host
from megasft.config.schema import RunConfig
from megasft.data.loader import Batch
from megasft.distributed.topology import Topology
from megasft.model.flops import step_flops
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.train.adapter_norms import AdapterNorms
from megasft.train.checkpoint.folder import RunState
from megasft.train.clock import StepClock
from megasft.train.device_monitor import NAMES, DeviceMonitor
from megasft.train.early_signs import EarlySigns, idle_experts
from megasft.train.expert_load import ExpertLoad
from megasft.train.forward_backward import Totals
from megasft.train.peak import measured_peak
from megasft.train.run_log import RunLog

# Numbers of a rank of which the largest over all ranks is recorded.
LARGEST = (
    "data_wait",
    "compute_seconds",
    "reduce_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "memory_allocated",
    "memory_reserved",
    "memory_peak",
    "rss",
)
OWN = (*LARGEST, "fed", *NAMES)


@dataclass(frozen=True)
class Outcome:
    """A step that has been taken. `state`: the run's after it; `rate`: its learning rate; `last`: of the run."""

    state: RunState
    batch: Batch
    totals: Totals
    rate: float
    grad_norm: float
    updated: bool
    epoch: float
    last: bool


class Observer:
    """Makes the lines of each step. Every rank makes one and calls its methods at the same steps.

    Where a step is recorded the ranks exchange their own numbers once, from host to host: the device is not waited for,
    but for norms, whose sums it computes after the step.

    Attributes:
        clock: of the steps.
        fed: tokens that entered this rank's model in the step, padding included.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, model: Qwen3Moe, optimizer: MegatronOptimizer, load: ExpertLoad
    ) -> None:
        self._config, self._topology, self._model, self._load = config, topology, model, load
        self.log = RunLog(config, topology)
        self.clock, self.fed = StepClock(), 0
        self._monitor, self._sampled = DeviceMonitor(), 0
        self._norms = AdapterNorms(model, optimizer, config.hyperparameters)
        self._signs = EarlySigns()
        self._flops = _model_flops(config, model)
        self._peak: float | None = None

    def start(self) -> None:
        """Measure what a run is compared with, and begin to sample the device."""
        peak = measured_peak(self._model.config.params_dtype)
        known = _gather([math.nan if peak is None else peak])
        self._peak = None if known.isnan().any() else float(known.mean())
        self._monitor.start()
        for line in self.log.lines():
            self._signs.see(line["kind"], line)

    def stop(self) -> None:
        """Sample and record no more."""
        self._monitor.stop()
        self.log.close()

    def begin(self) -> StepClock:
        """A step begins; returns its clock."""
        self.clock.begin()
        self.fed = 0
        return self.clock

    def validated(self, step: int, measured: dict[str, Any]) -> None:
        """Record a validation: what `validated` made of it, and the scores of answers."""
        self._record("validation", step, measured)

    def ended_early(self, state: RunState) -> None:
        """Record that the run ends because no validation has been the best for long."""
        settings = self._config.training.validation
        name = settings.metric_for_best_model.removeprefix("val.").replace("_", " ")
        than = "above" if settings.greater_is_better else "below"
        best = "was finite" if state.best is None else f"was {than} {state.best:.4f} of step {state.best_step}"
        reason = f"no validation {name} of the last {state.stale} {best}"
        self.log.record("event", state.step, event="early_stop", reason=reason)

    def epoch_ended(self, state: RunState) -> None:
        """Record the experts that got no token in the epoch that ends with this step."""
        for event in idle_experts(state.experts_seen, self._load.layers, self._load.experts):
            self.log.record("event", state.step, **event)

    def stepped(self, taken: Outcome) -> dict[str, Any]:
        """Record the step that has begun; returns its `train` line, with numbers of all ranks where it is recorded."""
        seconds, parts = self.clock.end()
        settings, step = self._config.logging, taken.state.step
        line = self._line(taken, seconds)
        if not taken.updated:
            reason = f"loss {taken.totals.loss}, gradient norm {taken.grad_norm}"
            self.log.record("event", step, event="skipped", reason=reason, samples=taken.batch.samples.tolist())
        if step % settings.every_steps == 0 or taken.last:
            self._record_step(taken, line, parts)
        if step % settings.experts_every_steps == 0:
            self.log.record("experts", step, tokens=self._load.tokens.tolist())
        return line

    def _line(self, taken: Outcome, seconds: float) -> dict[str, Any]:
        """What every rank knows of the step."""
        totals, batch, world = taken.totals, taken.batch, self._topology.world
        flops = sum(np.multiply(self._flops, (batch.tokens, totals.tokens, batch.squares)).tolist())
        rate = flops / seconds / world
        line = {
            "loss": totals.loss if taken.updated else None,
            "token_accuracy": totals.accuracy,
            "lr": taken.rate,
            "grad_norm": taken.grad_norm if math.isfinite(taken.grad_norm) else None,
            "epoch": taken.epoch,
            "tokens": batch.tokens,
            "trained_tokens": taken.state.tokens,
            "supervised_tokens": totals.tokens,
            "seconds": seconds,
            "data_wait": batch.waited,
            "tokens_per_second": batch.tokens / seconds,
            "tokens_per_second_per_device": batch.tokens / seconds / world,
            "model_flops_per_second": rate,
        }
        if self._peak:
            line["mfu"] = rate / self._peak
        return line | self._load.report()

    def _own(self, parts: dict[str, float], waited: float) -> list[float]:
        """This rank's numbers, in the order of OWN."""
        seconds = [parts.get(name, 0.0) for name in ("compute", "reduce", "optimizer")]
        memory = [*host.memory_in_use(), host.device_memory(), self._monitor.rss()]
        return [waited, *seconds, self.clock.take_saved(), *memory, self.fed, *self._monitor.values]

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record a line and the events that follow from it."""
        self.log.record(kind, step, **values)
        if self._topology.is_first:
            for event in self._signs.see(kind, values):
                self.log.record("event", step, **event)

    def _record_step(self, taken: Outcome, line: dict[str, Any], parts: dict[str, float]) -> None:
        """Complete and record a `train` line, and those of kinds `norms` and `devices`, with numbers of all ranks."""
        step = taken.state.step
        if taken.last and not self._monitor.samples:
            self._monitor.sample()
        own = self._own(parts, taken.batch.waited)
        squares = self._norms.squares(taken.rate, taken.state.updates) if taken.updated else []
        table = _gather([*own, *squares])
        columns = dict(zip(OWN, table.T, strict=False))
        sizes = self._topology.sizes
        fed = columns["fed"].sum().item() / (sizes.tensor * sizes.pipeline)  # whose ranks are fed the same tokens
        line["padding_share"] = 1 - line["tokens"] / fed if fed else 0.0
        for name in LARGEST:
            if not columns[name].isnan().all():
                largest = columns[name].nan_to_num(nan=-math.inf).max().item()
                line[name] = largest if name.endswith(("seconds", "wait")) else int(largest)
        if "memory_allocated" not in line:
            line["memory_peak"] = max(line["memory_peak"], line["rss"])  # Linux counts a process's peak in batches
        self._record("train", step, line)
        if squares:
            self.log.record("norms", step, **self._norms.of(table[:, len(own) :].sum(0).tolist()))
        busy = columns["data_wait"] + columns["compute_seconds"]
        if self._monitor.samples > self._sampled:
            self._sampled = self._monitor.samples
            lists = {name: _known(columns[name]) for name in NAMES if not columns[name].isnan().all()}
            self.log.record("devices", step, **lists, busy_seconds=busy.tolist())
        if not host.ranks_share_cores():  # where they do, they are slow in turn
            for event in self._signs.compare_ranks(busy.numpy()):
                self.log.record("event", step, **event)


def validated(totals: Totals) -> dict[str, Any]:
    """What a validation measured, by name; its `loss` is None, and there is no perplexity, where it is not finite."""
    values: dict[str, Any] = {"loss": None}
    if math.isfinite(totals.loss):
        values = {"loss": totals.loss, "perplexity": math.exp(min(totals.loss, 700.0))}
    return values | {"token_accuracy": totals.accuracy, "tokens": totals.tokens}


def _model_flops(config: RunConfig, model: Qwen3Moe) -> list[float]:
    """FLOPs that the model needs for a token, for a supervised one in addition, and for a token's pair in attention."""
    lora = config.lora
    each = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    return [step_flops(model.hf_config, lora.targets, lora.r, *counts, recompute=False).model for counts in each]


def _known(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _gather(own: list[float]) -> torch.Tensor:
    """The numbers of all ranks, fp64 [ranks, numbers], exchanged between the hosts.

    gloo's all-to-all of so few takes 1.4 ms between 4 ranks on two cores, its all-gather 3.6.
    """
    ranks = dist.get_world_size()
    mine = torch.tensor(own, dtype=torch.float64)
    everyone = torch.empty(ranks * len(own), dtype=torch.float64)
    dist.all_to_all_single(everyone, mine.repeat(ranks))
    return everyone.view(ranks, -1)
