"""A trainer's state from the checkpoint that `[checkpoint] resume` names."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasft.config.schema import RunConfig
from megasft.data.dataset import Mix
from megasft.data.loader import Loader
from megasft.distributed.topology import Topology
from megasft.train.checkpoint import resume
from megasft.train.checkpoint.async_writer import CheckpointWriter
from megasft.train.checkpoint.best import best_stands
from megasft.train.checkpoint.folder import RunState


@dataclass(frozen=True)
class Restored:
    """What a resumed run starts from.

    Attributes:
        changes: settings that differ from the checkpoint's, as "key now (was then)".
        same_run: whether the checkpoint is one of this run's own, so that its metrics.jsonl continues.
    """

    folder: Path
    state: RunState
    changes: list[str]
    same_run: bool


def restore(
    config: RunConfig,
    topology: Topology,
    identity: dict[str, Any],
    loader: Loader,
    writer: CheckpointWriter,
    validation: Mix | None,
) -> Restored | None:
    """Fill loader, weights and optimizer from a checkpoint; None for a run from the start. Every rank calls it.

    `output_dir` is left as it was when the checkpoint was written: what came later is moved aside. Raises UserError
    where the checkpoint is of another run or corrupted.
    """
    found = resume.find(config, topology)
    changes: list[str] = []
    with topology.together():
        if found is not None:
            folder, state = found
            resume.refuse_changes(state.identity, identity, config, folder)
            changes = resume.changed_settings(folder, config)
            loader.load_state_dict(state.loader, "data" in config.checkpoint.allow_changed)
            writer.load(folder, state.step, state.updates)
    with topology.together():
        if topology.is_first:
            resume.tidy(config, found)
    if found is None:
        return None
    folder, state = found
    measure = config.training.validation.measure
    if state.measure != measure:
        state = replace(state, measure=measure, best=None, best_step=0, stale=0)
    if validation is not None and config.training.validation.save_best_model_at_end:
        # A best of other validation data, or one that is gone, is no measure for later validations.
        stands = [topology.is_first and best_stands(Path(config.job.output_dir), state, validation)]
        dist.broadcast_object_list(stands)
        if not stands[0]:
            state = replace(state, best=None, best_step=0, stale=0)
    same_run = folder.parent == writer.checkpoints.folder.resolve()
    return Restored(folder, replace(state, identity=identity), changes, same_run)
