"""Losses with the reference in front of every token (teacher forcing), by conversation, turn and text or tool call."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.data.dataset import Mix
from megasft.data.micro_batches import MicroBatches, evaluation_rows
from megasft.evaluation.held_out import HeldOut
from megasft.model.qwen3_moe import Qwen3Moe

LOSS, RIGHT, TOKENS = range(3)


def measure_losses(
    model: Qwen3Moe,
    held_out: HeldOut,
    sequence_length: int,
    per_device_batch: int,
    on_micro_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Sums over supervised tokens, fp64 [conversations, parts, 3]: loss in nats, tokens predicted right, tokens.

    Every rank calls it, with the same conversations, and gets the same sums. Packed as the trainer's validation and
    without dropout. Parts are `Encoded.parts`: 2 * turn, + 1 in a tool call.
    """
    topology, mix = model.topology, Mix.of(held_out.samples)
    rows = evaluation_rows(mix, sequence_length, topology.sizes.data)
    batches = MicroBatches(mix, rows, per_device_batch, topology, host.device())
    shape = (len(held_out.conversations), int(held_out.parts[held_out.samples.mask.numpy()].max()) + 1, 3)
    sums = torch.zeros(shape, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outcomes = _forward(model, batches, sequence_length, on_micro_batch)
    finally:
        model.train(training)
    if outcomes and topology.groups.tp.rank() == 0:  # of the last stage; others of the tensor group have the same
        for found, chosen in zip(outcomes, batches.samples, strict=True):
            at = [_targets(held_out, number) for number, _ in chosen]
            if at:
                index = tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*at, strict=True))
                loss, right = found.double().cpu()
                sums.index_put_(index, torch.stack([loss, right, torch.ones_like(loss)], 1), accumulate=True)
    sums = sums.to(host.device())
    dist.all_reduce(sums)
    return sums.cpu().numpy()


def _forward(
    model: Qwen3Moe, batches: MicroBatches, sequence_length: int, on_micro_batch: Callable[[], None]
) -> list[Tensor]:
    def step(waiting: Any, _: Any) -> tuple[Tensor, Any]:
        on_micro_batch()
        return model.token_losses(next(waiting)), lambda output, non_loss_data: output

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _targets(held_out: HeldOut, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(conversation, part) of each supervised token of a sample, in the order of `MicroBatch.supervised`."""
    samples = held_out.samples
    own = slice(int(samples.starts[number]) + 1, int(samples.ends[number]))  # nothing predicts the first token
    parts = held_out.parts[own][samples.mask[own].numpy()]
    return np.full(len(parts), held_out.of[number]), parts.astype(np.int64)
