"""The global batches of a run one after the other, each prepared while those before it are computed."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from megasft.data.dataset import Batches, Mix
from megasft.data.identity import data_identity, refuse_other_data
from megasft.messages import UserError
from megasft.model.batch import MicroBatch

AHEAD = 2  # steps

Place = tuple[int, int]  # (epoch, row) of the first row of a global batch


@dataclass(frozen=True)
class Batch:
    """A step: this rank's micro batches, the samples of all ranks, their tokens and the sum of their squared lengths,
    seconds that the step waited.
    """

    micro_batches: list[MicroBatch]
    samples: np.ndarray
    tokens: int
    squares: int
    waited: float


class Loader:
    """Iterates over global batches without end, from the first one or from where `load_state_dict` puts it.

    Args:
        make: this rank's micro batches of a global batch, given by its rows; runs in a thread.
    """

    def __init__(
        self, samples: Mix, batches: Batches, make: Callable[[Sequence[np.ndarray]], list[MicroBatch]]
    ) -> None:
        self._samples, self._batches, self._make = samples, batches, make
        self._start((0, 0))

    def _start(self, place: Place) -> None:
        self._place = place  # of the batch that comes next
        self._ahead = place  # of the batch that is prepared next; the thread's own
        self._prepared: deque[Future[tuple[Batch, Place]]] = deque()
        # Nothing waits in this thread between two batches, so a loader that is dropped leaves nothing behind.
        self._thread = ThreadPoolExecutor(1, "loader")

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        started = time.monotonic()
        while len(self._prepared) <= AHEAD:
            self._prepared.append(self._thread.submit(self._prepare))
        batch, self._place = self._prepared.popleft().result()
        return replace(batch, waited=time.monotonic() - started)

    def _prepare(self) -> tuple[Batch, Place]:
        epoch, first = self._ahead
        rows = self._batches.rows(epoch, first)
        last = first + len(rows) == len(self._batches.epoch(epoch))
        self._ahead = (epoch + 1, 0) if last else (epoch, first + len(rows))
        samples = np.concatenate(rows)
        lengths = self._samples.lengths[samples].astype(np.int64)
        batch = Batch(self._make(rows), samples, int(lengths.sum()), int(lengths @ lengths), 0.0)
        return batch, self._ahead

    def state_dict(self) -> dict[str, Any]:
        """From which a loader of the same data goes on with the next batch, on any topology. JSON can hold it."""
        epoch, row = self._place
        return {"epoch": epoch, "row": row, "data": self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return data_identity(self._samples, self._batches)  # once: it reads every sample's length

    def load_state_dict(self, state: dict[str, Any], allow_changed: bool = False) -> None:
        """Go on where `state_dict` was called; with other data, if they are allowed, from the start of that epoch.

        Raises UserError if the data, or what orders them, have changed.
        """
        changed = refuse_other_data(state["data"], self._identity, allow_changed)
        place = (state["epoch"], 0 if changed else state["row"])
        if place[1] >= len(self._batches.epoch(place[0])):
            raise UserError(f"the checkpoint was written before row {place[1]} of an epoch that has not so many")
        self._thread.shutdown(cancel_futures=True)
        self._start(place)
