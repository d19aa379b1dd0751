"""From logits to a token."""

import torch
from torch import Tensor

from megasft.generation.request import check_sampling


class Sampler:
    """Chooses tokens: the most likely one at temperature 0, otherwise a random one.

    Samples from softmax(logits / temperature), restricted to the `top_k` most likely tokens (0: all), and of these to
    the fewest whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751),
    in the order of transformers. The same seed, logits and calls give the same tokens.

    Raises UserError for a value out of range, and for `top_p` or `top_k` at temperature 0.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> None:
        check_sampling(temperature, top_p, top_k, seed)
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
