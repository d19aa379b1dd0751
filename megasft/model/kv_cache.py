"""The KV cache of a conversation during generation, so that each new token costs the work of one position.

n: new tokens; T: n plus padding to a multiple of the sequence shards; g: key/value heads on this rank; d: head
dimension.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megasft.model.batch import Segments


class KVCache:
    """Keys and values of one conversation for all layers of this rank. Memory is allocated once and never zeroed.

    Attributes:
        tokens: the conversation so far; position i of the cache belongs to tokens[i].
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._room = 0
        self._layers: dict[int, Tensor] = {}  # [2, g, room, d] by the number of the layer

    def reserve(self, positions: int) -> None:
        """Allocate memory for this many positions, keeping the cached ones."""
        if positions <= self._room:
            return
        self._room, used = positions, len(self.tokens)
        for number, old in self._layers.items():
            self._layers[number] = old.new_empty(2, old.shape[1], positions, old.shape[3])
            self._layers[number][:, :, :used] = old[:, :, :used]

    def keep(self, prompt: list[int]) -> int:
        """Keep the longest common prefix with `prompt`, drop the rest and return the prefix's length.

        The last token of `prompt` is never part of the prefix, because its logits must be computed.
        """
        same = 0
        for old, new in zip(self.tokens, prompt[:-1], strict=False):
            if old != new:
                break
            same += 1
        del self.tokens[same:]
        return same

    def segments(self, new: list[int], multiple: int, device: torch.device) -> tuple[Tensor, "Continuation"]:
        """The next tokens, int64 [T], and their segments. T is a multiple of `multiple`, the number of sequence shards.

        The padding repeats the last token. A copy is routed to the same experts, so padding runs no other expert and
        reads no other weights.
        """
        padding = -len(new) % multiple
        past, n = len(self.tokens), len(new)
        tokens = torch.tensor(new + new[-1:] * padding, device=device)
        at = torch.arange(past, past + n + padding, device=device).clamp_(max=past + n - 1)
        mask = None
        if past and n > 1:
            mask = torch.arange(past + n, device=device) <= at[:n, None]
        return tokens, Continuation("thd", lengths=[n + padding], cache=self, new=n, at=at, mask=mask)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, step: "Continuation") -> Tensor:
        """Causal attention of the new tokens in layer `number`: q [T, h, d], k and v [T, g, d] -> [T, h, d]."""
        past, n = len(self.tokens), step.new
        if number not in self._layers:
            self._layers[number] = k.new_empty(2, k.shape[1], self._room, k.shape[2])
        held = self._layers[number]
        for kept, given in zip(held, (k, v), strict=True):
            kept[:, past : past + n] = given[:n].transpose(0, 1)
        keys, values = held[:, None, :, : past + n]
        y = nn.functional.scaled_dot_product_attention(
            q[:n].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=step.mask,
            is_causal=past == 0 and n > 1,
            enable_gqa=q.shape[1] > k.shape[1],
        )
        y = y[0].transpose(0, 1)
        return torch.cat([y, y[-1:].expand(len(q) - n, -1, -1)])


@dataclass
class Continuation(Segments):
    """Segments for new tokens of a conversation whose earlier tokens are in a KV cache.

    `at`, int64 [T], are the positions of the new tokens, and `new` is their number without padding. `mask`, bool [new,
    past + new], is the attention mask. It is None for the first tokens of a conversation, where attention is plainly
    causal, and for a single token, which sees all positions.
    """

    cache: KVCache = field(default_factory=KVCache)
    new: int = 0
    at: Any = None
    mask: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        return self.at[None]

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, core: nn.Module) -> Tensor:
        return self.cache.attend(number, q, k, v, self)
