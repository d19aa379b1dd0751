"""Lets another thread stop a run between two changes of its state, so that it can be saved there."""

import contextlib
import datetime
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megasft.train.checkpoint.folder import RunState

AGREEMENT = datetime.timedelta(seconds=60)  # of the ranks, where to hold


class Gate:
    """Every change of weights, optimizer and counters passes through it; once it is held, none does.

    Every rank makes one, at the same time.

    Args:
        describe: the run's state, asked for after each change.

    Attributes:
        rest: the state after the last change that is complete.
    """

    def __init__(self, describe: Callable[[], RunState]) -> None:
        self._describe = describe
        self.rest = describe()
        self._condition = threading.Condition()
        self._changing = False  # on the way to the next step
        self._limit = math.inf  # the step after which nothing changes any more
        self._group = dist.new_group(backend="gloo", timeout=AGREEMENT, group_desc="stop")

    @contextlib.contextmanager
    def change(self, step: int) -> Iterator[None]:
        """Change, in the body, what is saved, towards the state after `step`. Blocks forever once the gate is held."""
        with self._condition:
            self._condition.wait_for(lambda: self._limit == math.inf or (step == self._limit and step > self.rest.step))
            self._changing = step > self.rest.step
        yield
        with self._condition:
            self.rest, self._changing = self._describe(), False
            self._condition.notify_all()

    def unless_held(self, do: Callable[[], Any]) -> None:
        """Do it if the gate is not held, before it can be."""
        with self._condition:
            if self._limit == math.inf:
                do()

    def hold(self) -> None:
        """Return once the run rests after the last step that all ranks took; it stays there. Every rank calls it.

        The step in progress is abandoned, unless a rank has begun to change its weights. Raises RuntimeError where the
        ranks do not rest after the same step within a minute.
        """
        with self._condition:
            self._limit = self.rest.step + self._changing
        limits: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(limits, self._limit, group=self._group)
        with self._condition:
            # Where one rank is changing its weights, all are about to: it waits for them. They may.
            self._limit = max(limits)
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self.rest.step == self._limit, AGREEMENT.total_seconds()):
                raise RuntimeError("the ranks rest after different steps")
