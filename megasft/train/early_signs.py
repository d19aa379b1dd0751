"""Events for what experienced people watch for, from the lines of a run as they are written.

Everything here is on rank 0 and follows from the lines alone, so a resumed run reads its own lines and continues; only
what ranks are compared by is not among them and starts anew.
"""

import bisect
import statistics
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

WINDOW, ENOUGH = 50, 20  # lines that a value is compared with: at most, at least
DEVIATIONS = 8.0  # median absolute deviations above the median
LOSS_RATIO, GRAD_NORM_RATIO = 1.2, 4.0  # and so many times the median
RISES = 3  # validations in a row
SLOW, SLOW_LINES = 0.7, 3  # of the median tokens/s; lines in a row
SLOW_RANK = 1.25  # times the median of all ranks, in the median of ENOUGH lines

Event = dict[str, Any]  # the keys of an event's line


class EarlySigns:
    """Give it each line; it answers with the events to record."""

    def __init__(self) -> None:
        self._loss = Spikes("loss_spike", "loss", LOSS_RATIO)
        self._grad_norm = Spikes("grad_norm_spike", "grad_norm", GRAD_NORM_RATIO)
        self._rates: list[float] = []  # sorted
        self._slow_lines = 0
        self._validations: list[float] = []
        self._busy: deque[np.ndarray] = deque(maxlen=ENOUGH)
        self._slow_ranks: list[int] = []

    def see(self, kind: str, values: dict[str, Any]) -> list[Event]:
        """The events that follow from a line."""
        if kind == "train":
            return [*self._loss.see(values), *self._grad_norm.see(values), *self._throughput(values)]
        return list(self._validation(values)) if kind == "validation" else []

    def compare_ranks(self, busy: np.ndarray) -> list[Event]:
        """The event that follows from the seconds each rank was busy in a step, [ranks]."""
        self._busy.append(busy)
        if len(self._busy) < ENOUGH or len(busy) < 2:
            return []
        typical = np.median(self._busy, axis=0)
        middle = statistics.median_low(typical.tolist())
        slow = np.flatnonzero(typical > SLOW_RANK * middle).tolist()
        if slow and not self._slow_ranks:
            self._slow_ranks = slow
            worst = int(np.argmax(typical))
            others = f" (and ranks {', '.join(str(rank) for rank in slow if rank != worst)})" if len(slow) > 1 else ""
            reason = (
                f"rank {worst}{others} was busy {typical[worst]:.3f} s per step, the median rank {middle:.3f} s; ranks "
                "of one tensor, expert or pipeline group wait for each other and look alike"
            )
            return [{"event": "slow_rank", "reason": reason, "ranks": slow}]
        self._slow_ranks = slow and self._slow_ranks
        return []

    def _throughput(self, values: dict[str, Any]) -> Iterator[Event]:
        rate = values["tokens_per_second"]
        if len(self._rates) >= ENOUGH:
            middle = self._rates[len(self._rates) // 2]
            self._slow_lines = self._slow_lines + 1 if rate < SLOW * middle else 0
            if self._slow_lines == SLOW_LINES:
                reason = f"{rate:,.0f} tokens/s, {1 - rate / middle:.0%} below the run's median of {middle:,.0f}"
                yield {"event": "slow_throughput", "reason": reason}
        bisect.insort(self._rates, rate)

    def _validation(self, values: dict[str, Any]) -> Iterator[Event]:
        loss = values["loss"]
        if loss is None:
            return
        self._validations = [*self._validations[-RISES:], loss]
        last = self._validations
        if len(last) > RISES and all(a < b for a, b in pairwise(last)):
            course = " to ".join(f"{value:.4f}" for value in last)
            yield {"event": "validation_rising", "reason": f"the validation loss rose {RISES} times in a row, {course}"}
            self._validations = [loss]


class Spikes:
    """Finds values that stand out from those before them."""

    def __init__(self, event: str, key: str, ratio: float) -> None:
        self._event, self._key, self._ratio = event, key, ratio
        self._before: deque[float] = deque(maxlen=WINDOW)
        self._quiet = 0  # lines for which nothing more is said

    def see(self, values: dict[str, Any]) -> Iterator[Event]:
        """The event of a line's value, if it is one; a value that is not finite has an event of its own."""
        value = values[self._key]
        if value is None:
            return
        self._quiet -= 1
        if len(self._before) >= ENOUGH and self._quiet < 0:
            middle = statistics.median(self._before)
            deviation = statistics.median(abs(one - middle) for one in self._before)
            if value > max(self._ratio * middle, middle + DEVIATIONS * deviation):
                words = self._key.replace("_", " ")
                reason = f"{words} {value:.4f}, the median of the {len(self._before)} lines before is {middle:.4f}"
                yield {"event": self._event, "reason": reason}
                self._quiet = ENOUGH
        self._before.append(value)


# --- experts, whose counts every rank knows in each step --------------------------------------------------------------


def add_seen(seen: str, tokens: Tensor) -> str:
    """Which experts have got a token: `seen` so far (bits of [layers, experts] in hex, "" none) and now `tokens`."""
    bits = np.packbits(np.array(tokens.tolist()) > 0)
    if seen:
        bits |= np.frombuffer(bytes.fromhex(seen), np.uint8)
    return bits.tobytes().hex()


def idle_experts(seen: str, layers: list[int], experts: int) -> list[Event]:
    """The event of the experts that got no token. `layers`: numbers of the layers that have experts."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(seen), np.uint8))[: len(layers) * experts]
    idle = [[layers[row], expert] for row, expert in np.argwhere(bits.reshape(len(layers), experts) == 0).tolist()]
    if not idle:
        return []
    some = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in idle[:3]) + ", ..." * (len(idle) > 3)
    reason = f"{len(idle)} of {len(layers) * experts} experts got no token in this epoch: {some}"
    return [{"event": "idle_expert", "reason": reason, "experts": idle}]
