"""Decode token by token on all ranks in step: one rank chooses each token and sends it to the others."""

from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasft import host
from megasft.distributed.topology import Topology
from megasft.generation.sampling import Sampler
from megasft.messages import UserError
from megasft.model.batch import MicroBatch
from megasft.model.kv_cache import Chunk, KVCache
from megasft.model.qwen3_moe import Qwen3Moe

PREFILL = 2048  # tokens of a prompt in one forward pass, which bounds activations and masks


@torch.no_grad()
def generate(
    model: Qwen3Moe,
    prompt: list[int],
    max_new_tokens: int = 512,
    sampler: Sampler | None = None,
    stop: Collection[int] = (),
    cache: KVCache | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield the tokens that `model` generates after `prompt`, the same on every rank; all ranks iterate to the end.

    The answer ends with a token of `stop`, after `max_new_tokens`, at the end of the model's context, or when
    `interrupted` is true on any rank. All data-parallel replicas compute the same answer; experts sharded over them
    receive each token once from every replica.

    Args:
        prompt: token ids, the same on every rank; at least one.
        sampler: how tokens are chosen; None is greedy.
        cache: of an earlier call with the same model and weights; the common prefix of its conversation and `prompt` is
            not computed again. It holds the new conversation afterwards.

    Raises:
        UserError: an empty prompt, or one that leaves no room in the model's context (`max_position_embeddings`).
    """
    context = model.hf_config.max_position_embeddings
    check_length(prompt, context)
    sampler, cache = sampler or Sampler(), cache or KVCache()
    new = prompt[cache.keep(prompt) :]
    last = min(len(prompt) + max_new_tokens, context)
    cache.reserve(last)
    training = model.training
    model.eval()
    try:
        for length in range(len(prompt), last):
            logits = _logits_after(model, new, cache)
            chosen = sampler.choose(logits) if _chooses(model.topology) and logits is not None else -1
            token, stopped = _agree(chosen, interrupted())
            if stopped:
                return
            yield token
            if token in stop or length + 1 == last:
                return
            new = [token]
    finally:
        model.train(training)


def check_length(prompt: list[int], context: int) -> None:
    """Raise UserError unless the prompt has tokens and leaves room for one more."""
    if not prompt:
        raise UserError("the prompt is empty; give it some text")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {context}; shorten it"
        )


def _logits_after(model: Qwen3Moe, new: list[int], cache: KVCache) -> Tensor | None:
    """Run new tokens through the model and into the cache; the logits after the last token, on the last stage."""
    logits = None
    for first in range(0, len(new), PREFILL):
        logits = forward(model, cache, [Chunk(0, new[first : first + PREFILL])], model.next_logits)
    return None if logits is None else logits[-1]


def forward(
    model: Qwen3Moe, cache: KVCache, chunks: list[Chunk], head: Callable[[MicroBatch], Tensor]
) -> Tensor | None:
    """Run new tokens through the model and into the cache; what `head` makes of the last position of each chunk, on the
    last stage. Every rank calls it, of all replicas that share experts, those without chunks too.
    """
    tokens, segments = cache.append(chunks, model.topology.sizes.tensor, host.device())
    ends = torch.tensor([len(chunk.tokens) for chunk in chunks], dtype=torch.int64).cumsum(0) - 1
    outcomes = get_forward_backward_func()(
        forward_step_func=lambda batches, _: (head(next(batches)), lambda output, non_loss_data: output),
        data_iterator=iter([MicroBatch(tokens, tokens, segments, supervised=ends.to(host.device()))]),
        model=[model],
        num_microbatches=1,
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outcomes[0] if outcomes else None


def _chooses(topology: Topology) -> bool:
    """Whether this rank chooses the tokens. Other ranks have the same logits up to rounding only."""
    return topology.is_last_stage and topology.groups.tp.rank() == 0 and topology.groups.dp.rank() == 0


def _agree(chosen: int, stopped: bool) -> tuple[int, bool]:
    """(the token that was chosen, whether any rank was interrupted)."""
    said = torch.tensor([chosen, int(stopped)], device=host.device())
    dist.all_reduce(said, dist.ReduceOp.MAX)
    token, any_stopped = said.tolist()
    return token, bool(any_stopped)
