"""The keys and values of a conversation that is being continued, so that each new token costs one position of work.

n: new tokens; T: n and what fills the sequence shards up; g: key/value heads here; d: head dimension.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megasft.model.batch import Segments


class KVCache:
    """Keys and values of one conversation, on every layer of this rank; the room is taken once, and never zeroed.

    Attributes:
        tokens: the conversation so far: position i holds what token i gave.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._room = 0
        self._layers: dict[int, Tensor] = {}  # [2, g, room, d] by the number of the layer

    def reserve(self, positions: int) -> None:
        """Make room for so many, keeping what there is."""
        if positions <= self._room:
            return
        self._room, used = positions, len(self.tokens)
        for number, old in self._layers.items():
            self._layers[number] = old.new_empty(2, old.shape[1], positions, old.shape[3])
            self._layers[number][:, :, :used] = old[:, :, :used]

    def keep(self, prompt: list[int]) -> int:
        """Forget all that is not the beginning of `prompt`, whose last token is always new; how much is left."""
        same = 0
        for old, new in zip(self.tokens, prompt[:-1], strict=False):
            if old != new:
                break
            same += 1
        del self.tokens[same:]
        return same

    def segments(self, new: list[int], multiple: int, device: torch.device) -> tuple[Tensor, "Continuation"]:
        """(int64 [T], their description) of tokens to come behind those here, T a multiple of the shards they go to.

        They are filled up with copies of the last one. A copy wants the same experts, so that none is run, and no
        weight is read, for the sake of the padding.
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
        """Causal attention of new tokens to all: q [T, h, d], k and v [T, g, d] of layer `number`: [T, h, d]."""
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
    """The description of new tokens of one conversation, which lies in a cache as far as it has come.

    `at` int64 [T] are their positions, `new` says how many are not padding. `mask` bool [new, past + new] says what
    each may see, where it takes saying: in neither the first part of a conversation, nor a single token.
    """

    cache: KVCache = field(default_factory=KVCache)
    new: int = 0
    at: Any = None
    mask: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        return self.at[None]

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, core: nn.Module) -> Tensor:
        return self.cache.attend(number, q, k, v, self)
