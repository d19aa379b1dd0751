"""From logits to a token."""

import math

import torch
from torch import Tensor

from megasft.messages import UserError


class Sampler:
    """Chooses tokens: the likeliest at temperature 0, otherwise one at random.

    Drawn from softmax(logits / temperature), of which only the `top_k` likeliest are left (0: all), and of these the
    fewest whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751); the
    order is transformers'. The same seed, logits and calls give the same tokens.

    Raises UserError for a value that cannot be, and for `top_p` or `top_k` where nothing is drawn.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature = {temperature:g}: must be 0, which is greedy, or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p = {top_p:g}: must be above 0 and at most 1, which is off")
        if top_k < 0:
            raise UserError(f"top_k = {top_k}: must be 0, which is off, or more")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed = {seed}: must be 0 or more and below 2^63")
        if temperature == 0 and (top_p < 1 or top_k):
            raise UserError("top_p and top_k change nothing at temperature 0, which is greedy; set a temperature too")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """The next token for logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        # On the CPU, so that a seed means the same wherever the model runs.
        values, tokens = logits.detach().to("cpu", torch.float32).sort(descending=True, stable=True)
        if self.top_k:
            values, tokens = values[: self.top_k], tokens[: self.top_k]
        chances = ((values - values[0]) / self.temperature).softmax(0)
        before = chances.cumsum(0) - chances
        chances[1:][before[1:] >= self.top_p] = 0
        return int(tokens[torch.multinomial(chances, 1, generator=self._generator)])
