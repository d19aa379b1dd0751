"""The loss head: logits and their gradient for supervised positions only, in chunks.

The head is frozen, so backward needs only the gradient of the hidden states. Forward computes it chunk by chunk, while
it has the chunk's logits, so that neither the full logits nor their gradient ever exist. The vocabulary is split over
the tensor-parallel ranks, with the reductions of vocabulary-parallel cross entropy (Megatron-LM, Shoeybi et al. 2019,
section 3).

n: supervised positions of the micro batch; V: vocabulary rows on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

CHUNK_BYTES = 256 * 2**20  # fp32 logits of one chunk
MIN_CHUNK, MAX_CHUNK = 64, 4096


@dataclass
class Head:
    """This rank's part of the head.

    Attributes:
        weight: [V, H], its rows without padding.
        first_row: vocabulary id of the first.
        group: the tensor-parallel ranks that have the others.
        sequence_parallel: whether hidden states come as sequence shards.
    """

    weight: Tensor
    first_row: int
    group: dist.ProcessGroup
    sequence_parallel: bool


def supervised_loss(hidden: Tensor, labels: Tensor, at: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Over supervised positions: the summed cross entropy, fp32 [], and how many targets no logit exceeds, int64 [].

    Args:
        hidden: [S, 1, H] after the final norm; a sequence shard if `head.sequence_parallel`.
        labels: int64 [T].
        at: int64 [n], the supervised positions.
    """
    if head.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=head.group)
    # Each rank's gradient covers its part of the vocabulary only; the gather's backward sums the ranks' gradients.
    return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), labels.index_select(0, at), at, head)


@torch.no_grad()
def token_losses(hidden: Tensor, labels: Tensor, at: Tensor, head: Head) -> Tensor:
    """Of each supervised position the cross entropy, and 1 where no logit exceeds the target's: fp32 [2, n].

    Args as `supervised_loss`'s.
    """
    if head.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=head.group)
    found = [hidden.new_zeros(2, 0, dtype=torch.float32)]
    for where in at.split(chunk_length(head.weight)):
        logits = (hidden.flatten(0, -2).index_select(0, where) @ head.weight.t()).float()
        targets = labels.index_select(0, where) - head.first_row
        loss, correct, _ = _cross_entropy(logits, targets, head.group, False)
        found.append(torch.stack([loss, correct.float()]))
    return torch.cat(found, 1)


def chunk_length(weight: Tensor) -> int:
    """Positions whose logits are computed together: weight [V, H]."""
    return min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // (4 * weight.shape[0])))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, at: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        weight, needs_grad = head.weight, hidden.requires_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        chunk = chunk_length(weight)
        grads = []
        for where, target in zip(at.split(chunk), targets.split(chunk), strict=True):
            x = hidden.index_select(0, where)
            logits = (x @ weight.t()).float()
            part_loss, part_correct, g_logits = _cross_entropy(logits, target - head.first_row, head.group, needs_grad)
            loss += part_loss.sum()
            correct += part_correct.sum()
            if needs_grad:
                grads.append(g_logits.to(weight.dtype) @ weight)
        ctx.shape, ctx.needs_grad = hidden.shape, needs_grad
        if needs_grad:
            ctx.save_for_backward(at, torch.cat(grads) if grads else hidden.new_zeros(0, hidden.shape[1]))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        at, grads = ctx.saved_tensors
        g_hidden = grads.new_zeros(ctx.shape)
        g_hidden.index_copy_(0, at, grads * g_loss.to(grads.dtype))
        return g_hidden, None, None, None


def _cross_entropy(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target the loss, fp32 [n], and whether it has the highest logit, bool [n]; and the gradient of the summed
    loss, written in place of the logits, fp32 [n, V]. Targets are relative to this rank's first row.
    """
    split = group.size() > 1
    top = logits.amax(dim=-1)
    if split:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    logits -= top[:, None]
    here = (target >= 0) & (target < logits.shape[1])
    column = target.clamp(0, logits.shape[1] - 1)[:, None]  # of another rank's target any: it counts for nothing
    # [2, n]: the target's logit and the sum of exponentials, reduced in one call.
    sums = logits.new_empty(2, len(target))
    sums[0] = torch.where(here, logits.gather(1, column).squeeze(1), 0.0)
    logits.exp_()
    torch.sum(logits, dim=-1, out=sums[1])
    if split:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    loss = sums[1].log() - sums[0]
    correct = sums[0] == 0  # the highest logit of the vocabulary is subtracted from all
    if needs_grad:
        logits /= sums[1][:, None]
        logits.scatter_(1, column, logits.gather(1, column) - here[:, None].float())
    return loss, correct, logits
