"""Decode many prompts at once, greedily: rows of a batch on each data-parallel replica, which all step together."""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist

from megasft import host
from megasft.generation.decode import PREFILL, check_length, forward
from megasft.model.kv_cache import Chunk, KVCache, common_prefix
from megasft.model.qwen3_moe import Qwen3Moe

ROWS = 64  # prompts that a replica decodes at once
POSITIONS = 2**17  # and the most tokens of their caches; one prompt may have more
ROOM = 64  # positions by which a cache grows at least
SHARED = 32  # a shorter common beginning of two prompts is computed twice


@torch.no_grad()
def generate_many(
    model: Qwen3Moe,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 512,
    stop: Collection[int] = (),
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The greedy answers to many prompts, on every rank: in fp32 the tokens that `generate` gives each alone.

    Replicas share the prompts. Each decodes up to 64 of them at once, in their order, and computes the common beginning
    of two that follow each other once. A row that ends makes the batch smaller.

    Args:
        prompts: token ids of each prompt, the same on every rank; at least one token each.
        stop: an answer ends with one of these tokens, after `max_new_tokens`, or at the end of the model's context.
        on_step: called after each forward pass.

    Returns:
        For each prompt its new tokens, the one of `stop` included.

    Raises:
        UserError: an empty prompt, or one that leaves no room in the model's context (`max_position_embeddings`).
    """
    context = model.hf_config.max_position_embeddings
    for prompt in prompts:
        check_length(prompt, context)
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    replicas = model.topology.sizes.data
    batches = _cut([len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)], replicas)
    answers: list[list[int]] = []
    training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), replicas):
            together = [
                _Rows([prompts[i] for i in batch], [limits[i] for i in batch], stop)
                for batch in batches[first : first + replicas]
            ]
            together += [_Rows([], [], stop) for _ in range(replicas - len(together))]
            _decode(model, together, on_step)
            answers += [answer for rows in together for answer in rows.answers]
    finally:
        model.train(training)
    return answers


class _Rows:
    """The prompts of one replica and their answers so far; every rank keeps those of all replicas.

    Attributes:
        live: the number of the prompt in each row of the cache.
    """

    def __init__(self, prompts: list[list[int]], limits: list[int], stop: Collection[int]) -> None:
        self.prompts, self._limits, self._stop = prompts, limits, stop
        self.live = list(range(len(prompts)))
        self.answers: list[list[int]] = [[] for _ in prompts]

    def prefill(self) -> list[list[Chunk]]:
        """The forward passes of the prompts, at most PREFILL tokens each."""
        passes: list[list[Chunk]] = []
        room = 0
        for row, prompt in enumerate(self.prompts):
            copied = common_prefix(self.prompts[row - 1], prompt[:-1]) if row else 0
            at = copied = copied if copied >= SHARED else 0
            while at < len(prompt):
                if not room:
                    passes.append([])
                    room = PREFILL
                tokens = prompt[at : at + room]
                passes[-1].append(
                    Chunk(row, tokens, row - 1, copied) if at == copied and copied else Chunk(row, tokens)
                )
                at, room = at + len(tokens), room - len(tokens)
        return passes

    def hear(self, tokens: Sequence[int]) -> list[int]:
        """The next token of each row; returns the rows that end with it, in the order in which to drop them."""
        ended = []
        for row, token in enumerate(tokens):
            answer = self.answers[self.live[row]]
            answer.append(token)
            if token in self._stop or len(answer) == self._limits[self.live[row]]:
                ended.append(row)
        for row in reversed(ended):
            self.live[row] = self.live[-1]
            del self.live[-1]
        return ended[::-1]


def _cut(lengths: list[int], replicas: int) -> list[list[int]]:
    """Prompts of these lengths in batches, one for a replica each, in their order."""
    most = min(ROWS, -(-len(lengths) // replicas))
    batches: list[list[int]] = []
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if not batches or len(batches[-1]) == most or longest * (len(batches[-1]) + 1) > POSITIONS:
            batches.append([])
            longest = length
        batches[-1].append(i)
    return batches


def _decode(model: Qwen3Moe, replicas: list[_Rows], on_step: Callable[[], None]) -> None:
    """Answer the prompts of all replicas; every rank computes those of its own."""
    mine = model.topology.groups.dp.rank()
    own = replicas[mine]
    cache = KVCache(len(own.prompts))
    passes = [rows.prefill() for rows in replicas]
    cache.reserve(max(map(len, own.prompts), default=0) + ROOM)
    chosen: dict[int, int] = {}
    for number in range(max(map(len, passes))):
        chunks = passes[mine][number] if number < len(passes[mine]) else []
        tokens = forward(model, cache, chunks, model.next_tokens)
        if tokens is not None:  # of a prompt that continues in the next pass, the last one counts
            chosen |= zip((chunk.row for chunk in chunks), tokens.tolist(), strict=True)
        on_step()
    while True:
        said = _agree(replicas, mine, [chosen[row] for row in range(len(own.live))] if chosen else [])
        for rows, heard in zip(replicas, said, strict=True):
            ended = rows.hear(heard)
            if rows is own:
                for row in ended:
                    cache.drop(row)
        if not any(rows.live for rows in replicas):
            return
        longest = max(map(len, cache.rows), default=0) + 1
        cache.reserve(longest if longest <= cache.room else longest + max(ROOM, longest // 2))
        chunks = [Chunk(row, [own.answers[i][-1]]) for row, i in enumerate(own.live)]
        chosen = {}
        tokens = forward(model, cache, chunks, model.next_tokens)
        if tokens is not None:
            chosen = dict(enumerate(tokens.tolist()))
        on_step()


def _agree(replicas: list[_Rows], mine: int, chosen: list[int]) -> list[list[int]]:
    """The next token of each row of all replicas, from the ranks of the last stage."""
    counts = [len(rows.live) for rows in replicas]
    said = torch.full((sum(counts),), -1)
    if chosen:
        first = sum(counts[:mine])
        said[first : first + len(chosen)] = torch.tensor(chosen)
    said = said.to(host.device())
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return [part.tolist() for part in said.cpu().split(counts)]
