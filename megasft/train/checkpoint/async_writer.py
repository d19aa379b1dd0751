"""Writing checkpoints in the background.

A save copies this rank's states to host memory and returns. A thread of each rank then writes the rank's file; that of
rank 0 makes the adapter from the files, adds the rest and gives the folder its name. The threads have a gloo group of
their own. A failure on any rank reaches all; what was written is removed and earlier checkpoints stay as they are.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megasft.adapters.adapter_file import AdapterWriter
from megasft.adapters.peft_layout import CONFIG, WEIGHTS
from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.storage.digests import file_sha256
from megasft.train.checkpoint.folder import Checkpoints, RunState, manifest, optimizer_file
from megasft.train.checkpoint.optimizer_shards import OptimizerShards, SavedShards


@dataclass(frozen=True)
class Outcome:
    """How a save ended: the checkpoint of `step` is in `folder`, or `failure` says why it is not."""

    step: int
    folder: Path
    failure: str | None


class CheckpointWriter:
    """Writes checkpoints of a run. Every rank makes one and calls `save` at the same steps.

    `take_outcome` tells, once, how each save ended.
    """

    def __init__(
        self, config: RunConfig, model: Qwen3Moe, optimizer: MegatronOptimizer, base_model: str, folder: Path
    ) -> None:
        self.checkpoints = Checkpoints(folder)
        self._outcomes: deque[Outcome] = deque()
        self._config, self._model, self._base_model = config, model, base_model
        self._topology = model.topology
        self._states = OptimizerShards(model, optimizer)
        self._group = dist.new_group(backend="gloo", group_desc="checkpoints")
        self._thread = ThreadPoolExecutor(1, "saver")
        self._pending: Future[str | None] | None = None
        self._saved_step: int | None = None

    def save(self, state: RunState) -> Path:
        """Start to save the current state; returns its folder. Waits for the previous save, if it is not done."""
        if self._saved_step != state.step:
            self.wait()
            self._states.copy()
            self._saved_step = state.step
            self._pending = self._thread.submit(self._write, state)
        else:  # the run was resumed from it
            self._outcomes.append(Outcome(state.step, self.checkpoints.of(state.step), None))
        return self.checkpoints.of(state.step)

    def wait(self) -> str | None:
        """Return once nothing is being written: why the last save failed, None if it did not."""
        return None if self._pending is None else self._pending.result()

    def take_outcome(self) -> "Outcome | None":
        """How the oldest save ended that nobody has asked about yet; None if there is none."""
        return self._outcomes.popleft() if self._outcomes else None

    @property
    def has_outcome(self) -> bool:
        """Whether `take_outcome` has one."""
        return bool(self._outcomes)

    @property
    def parts_written(self) -> int:
        """Grows while a checkpoint is written."""
        return self._states.written

    def load(self, folder: Path, step: int, updates: int) -> None:
        """Fill weights and optimizer from a checkpoint. Raises UserError."""
        files = [folder / name for name in sorted(manifest(folder)) if name.startswith("optimizer-")]
        self._states.load(files, updates)
        if folder == self.checkpoints.of(step).resolve():
            self._saved_step = step

    def _write(self, state: RunState) -> str | None:
        work: Path | None = None
        try:
            work = self._together(lambda: self.checkpoints.begin(state.step) if self._topology.is_first else None)[0]
            assert work is not None
            name = optimizer_file(self._topology.rank, self._topology.world)
            digests = dict(self._together(lambda: (name, self._states.write(work / name))))
            self._together(lambda: self._finish(work, state, digests) if self._topology.is_first else None)
            self._outcomes.append(Outcome(state.step, self.checkpoints.of(state.step), None))
            return None
        except (UserError, OSError, RuntimeError) as error:  # RuntimeError: torch.distributed's, if a rank is gone
            self._saved_step = None
            if work and self._topology.is_first:
                shutil.rmtree(work, ignore_errors=True)
            self._outcomes.append(Outcome(state.step, self.checkpoints.of(state.step), str(error)))
            return str(error)

    def _finish(self, work: Path, state: RunState, digests: dict[str, str]) -> None:
        self._write_adapter(work, SavedShards(work / name for name in digests))
        digests |= {name: file_sha256(work / name) for name in (WEIGHTS, CONFIG)}
        self.checkpoints.finish(work, state.step, state, self._config, digests)
        self.checkpoints.prune(self._config.checkpoint.keep, state.best_step)

    def _write_adapter(self, work: Path, saved: SavedShards) -> None:
        """The adapter, from the master weights."""
        lora, dtype, shapes = self._model.lora, self._model.config.params_dtype, saved.shapes("master")
        folder, base = work / "adapter", self._base_model
        writer = AdapterWriter(folder, shapes, dtype, lora.r, lora.alpha, "per-expert", base)
        try:
            for factor, rectangle, value in saved.of("master"):
                writer.put(factor, tuple(slice(*span) for span in rectangle), value)
            writer.finish()
        except BaseException:
            writer.discard()
            raise
        for name in (WEIGHTS, CONFIG):
            os.rename(folder / name, work / name)
        os.rmdir(folder)

    def _together(self, do: Callable[[], Any]) -> list[Any]:
        """The results of `do` on all ranks. Raises UserError on all where it fails on any."""
        answer: Any = None
        failure: str | None = None
        try:
            answer = do()
        except (UserError, OSError) as error:
            failure = f"rank {self._topology.rank}: {getattr(error, 'strerror', None) or error}"
        said: list[Any] = [None] * self._topology.world
        dist.all_gather_object(said, (failure, answer), group=self._group)
        failed = next((words for words, _ in said if words), None)
        if failed:
            raise UserError(failed)
        return [answer for _, answer in said]
