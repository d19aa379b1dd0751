"""Learning rate by optimizer step: warm-up, then linear or cosine decay to zero, or constant; transformers' curves."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Step t (from 0) trains with `rate(t)`. Equal to transformers' `get_scheduler` of the same name.

    As there, warm-up starts from zero (the first step of a warmed-up run only fills the optimizer's moments) and
    lasts ceil(warmup_ratio * total_steps) steps; but never all of them, which would leave a run of one step at zero.
    """

    kind: Literal["linear", "cosine", "constant"]
    peak: float
    total_steps: int
    warmup_ratio: float

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak."""
        return min(self._asked, self.total_steps - 1)

    @property
    def shortened(self) -> str:
        """What to tell the user where warm-up is shorter than `warmup_ratio` asks for; "" where it is not."""
        if self.warmup_steps == self._asked:
            return ""
        steps = f"all {self.total_steps} steps" if self.total_steps > 1 else "the only step"
        return (
            f"[hyperparameters] warmup_ratio = {self.warmup_ratio:g} would make warm-up, which starts at learning rate "
            f"0, of {steps}; it is shortened to {self.warmup_steps}, so that the last step trains at learning_rate"
        )

    @property
    def _asked(self) -> int:
        return math.ceil(self.total_steps * self.warmup_ratio)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
