"""The KV cache of conversations during generation, so that each new token costs the work of one position.

B: rows of the cache, one conversation each; T: new tokens plus padding to a multiple of the sequence shards; h, g:
query and key/value heads on this rank; d: head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megasft.model.batch import Segments


class Chunk(NamedTuple):
    """New tokens of one conversation.

    Attributes:
        row: of the cache.
        tokens: at least one.
        source, copied: the row begins anew, with the first `copied` positions of the row `source`, whose tokens were
            given earlier, or in an earlier chunk of the same step. 0: it continues.
    """

    row: int
    tokens: list[int]
    source: int = 0
    copied: int = 0


class KVCache:
    """Keys and values of one or several conversations for all layers of this rank.

    Memory begins as zeros: what is masked has no weight, but would spread a NaN all the same.

    Attributes:
        rows: the conversations so far; position i of row r belongs to rows[r][i].
        room: positions for which there is memory in each row.
    """

    def __init__(self, rows: int = 1) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.room = 0
        self._layers: dict[int, Tensor] = {}  # [2, B, g, room, d] by the number of the layer

    @property
    def tokens(self) -> list[int]:
        """The first row's conversation."""
        return self.rows[0]

    def reserve(self, positions: int) -> None:
        """Allocate memory for this many positions in each row, keeping the cached ones."""
        if positions <= self.room:
            return
        self.room, used = positions, max(map(len, self.rows))
        for number, old in self._layers.items():
            self._layers[number] = old.new_zeros(*old.shape[:3], positions, old.shape[4])
            self._layers[number][:, :, :, :used] = old[:, :, :, :used]

    def keep(self, prompt: list[int]) -> int:
        """Keep the longest common prefix of the first row with `prompt`, drop the rest and return the prefix's length.

        The last token of `prompt` is never part of the prefix, because its logits must be computed.
        """
        same = common_prefix(self.tokens, prompt[:-1])
        del self.tokens[same:]
        return same

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its number."""
        last = len(self.rows) - 1
        if row != last:
            used = len(self.rows[last])
            for held in self._layers.values():
                held[:, row, :, :used] = held[:, last, :, :used]
            self.rows[row] = self.rows[last]
        del self.rows[last]

    def append(self, chunks: Sequence[Chunk], multiple: int, device: torch.device) -> tuple[Tensor, "Continuation"]:
        """The next tokens, int64 [T], and their segments; `rows` has them from now on.

        T is a multiple of `multiple`, the number of sequence shards. The padding repeats the last token. A copy is
        routed to the same experts, so padding runs no other expert and reads no other weights. Without chunks all is
        padding.
        """
        pasts, tokens, places = [], list[int](), list[int]()
        for row, new, source, copied in chunks:
            if copied:
                self.rows[row] = self.rows[source][:copied]
            pasts.append(len(self.rows[row]))
            self.rows[row] += new
            tokens += new
            places += range(pasts[-1], len(self.rows[row]))
        n = len(tokens)
        padding = -n % multiple or (0 if n else multiple)
        tokens += (tokens[-1:] or [0]) * padding
        places += (places[-1:] or [0]) * padding
        ids = torch.tensor([tokens, places], device=device)
        step = Continuation("thd", lengths=[n + padding], cache=self, chunks=list(chunks), pasts=pasts, at=ids[1])
        if n > 1 and [(row, 1, 0) for row in range(n)] == [(c.row, len(c.tokens), c.copied) for c in chunks]:
            step.mask = torch.arange(max(pasts) + 1, device=device) <= ids[1, :n, None, None, None]
        return ids[0], step

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, step: "Continuation") -> Tensor:
        """Causal attention of the new tokens in layer `number`: q [T, h, d], k and v [T, g, d] -> [T, h, d]."""
        if number not in self._layers:
            self._layers[number] = k.new_zeros(2, len(self.rows), k.shape[1], self.room, k.shape[2])
        held, kv = self._layers[number], torch.stack((k, v))
        if step.mask is not None:
            y = _attend_one_each(held, q, kv, step)
        else:
            outputs, first = [q[:0]], 0
            for chunk, past in zip(step.chunks, step.pasts, strict=True):
                own = slice(first, first := first + len(chunk.tokens))
                if chunk.copied:
                    held[:, chunk.row, :, :past] = held[:, chunk.source, :, :past]
                outputs.append(_attend_chunk(held[:, chunk.row], q[own], kv[:, own], past))
            y = torch.cat(outputs)
        if padding := len(q) - len(y):
            y = torch.cat([y, y[-1:].expand(padding, -1, -1) if len(y) else torch.zeros_like(q)])
        return y


@dataclass
class Continuation(Segments):
    """Segments for new tokens of conversations whose earlier tokens are in a KV cache.

    `pasts` are the positions of the cache before each chunk, and `at`, int64 [T], the position of each token. `mask`,
    bool [n, 1, 1, longest], says what each token sees where n rows, the first ones in order, have one token each; None
    elsewhere.
    """

    cache: KVCache = field(default_factory=KVCache)
    chunks: list[Chunk] = field(default_factory=list)
    pasts: list[int] = field(default_factory=list)
    at: Any = None
    mask: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        return self.at[None]

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, core: nn.Module) -> Tensor:
        return self.cache.attend(number, q, k, v, self)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists share from their beginning on."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _attend_chunk(held: Tensor, q: Tensor, kv: Tensor, past: int) -> Tensor:
    """Put a chunk behind its row's past and attend: held [2, g, room, d], q [n, h, d], kv [2, n, g, d] -> [n, h, d]."""
    n = len(q)
    held[:, :, past : past + n] = kv.transpose(1, 2)
    keys, values = held[:, None, :, : past + n]
    mask = None
    if past and n > 1:
        mask = torch.ones(n, past + n, dtype=torch.bool, device=q.device).tril(past)
    y = nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        is_causal=past == 0 and n > 1,
        enable_gqa=q.shape[1] > keys.shape[1],
    )
    return y[0].transpose(0, 1)


def _attend_one_each(held: Tensor, q: Tensor, kv: Tensor, step: Continuation) -> Tensor:
    """One token for each of the first n rows: held [2, B, g, room, d], q [T, h, d], kv [2, T, g, d] -> [n, h, d].

    The query heads that share a key/value head are its queries, so that no key is repeated.
    """
    assert step.mask is not None
    n, longest = len(step.chunks), step.mask.shape[-1]
    d, g = q.shape[2], kv.shape[2]
    held[:, torch.arange(n, device=q.device), :, step.at[:n]] = kv[:, :n].transpose(0, 1)
    keys, values = held[:, :n, :, :longest]
    y = nn.functional.scaled_dot_product_attention(q[:n].view(n, g, -1, d), keys, values, attn_mask=step.mask)
    return y.reshape(n, -1, d)
