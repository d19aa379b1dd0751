"""Tokenized samples, mixes of several files, and which samples make up each global batch.

That depends on the seed, the epoch and the size of the global batch only, never on the topology.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasft.data.identity import MADE_OF
from megasft.data.packing import Rows, pack
from megasft.data.template import Encoded
from megasft.data.token_cache import content_digest, open_columns
from megasft.data.tokenize import Tokens
from megasft.distributed.topology import derived_seed
from megasft.messages import UserError


@dataclass(frozen=True)
class Samples:
    """Conversations as tokens: sample i is ids[starts[i]:ends[i]] (int32) with mask (bool), True for targets.

    Without `starts` they lie end to end. The tensors may be files mapped into memory (`token_cache`), of whose
    content `digest` then is; `made_of` says of what (`data.identity`), and `places`, int64 [samples], where in the
    files of `path` the conversation of each sample is (`account.Place`).
    """

    ids: Tensor
    mask: Tensor
    ends: Tensor
    starts: Tensor = None  # type: ignore[assignment]
    digest: str = ""
    made_of: dict[str, Any] = field(default_factory=dict)
    places: Tensor | None = None
    path: str = ""

    def __post_init__(self) -> None:
        if self.starts is None:
            object.__setattr__(self, "starts", torch.cat([self.ends.new_zeros(1), self.ends[:-1]]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        chosen = slice(int(self.starts[i]), int(self.ends[i]))
        return self.ids[chosen], self.mask[chosen]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model is fed of each sample, int64: the last one is only ever a target."""
        return (self.ends - self.starts).numpy() - 1

    @classmethod
    def open(cls, folder: Path, path: str = "") -> "Samples":
        """Those of a folder that `cache.prepare` gave for the conversations in `path`, mapped into memory."""
        columns = open_columns(folder)
        ids, mask, ends, places = (torch.from_numpy(columns[name]) for name in ("ids", "mask", "ends", "places"))
        made_of = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
        return cls(ids, mask, ends, digest=content_digest(folder), made_of=made_of, places=places, path=path)

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> "Samples":
        """Lay encoded conversations end to end."""
        tokens = Tokens.of(encoded)
        ids, mask, ends = map(torch.from_numpy, (tokens.ids, tokens.mask, tokens.lengths.cumsum()))
        return cls(ids, mask, ends)

    def take(self, indices: np.ndarray) -> "Samples":
        """The samples of these numbers, without copying a token."""
        chosen = torch.from_numpy(indices)
        places = None if self.places is None else self.places[chosen]
        return replace(self, ends=self.ends[chosen], starts=self.starts[chosen], places=places)


@dataclass(frozen=True)
class Mix:
    """The samples of several sources, numbered through, and how often an epoch goes through each source.

    A weight of 1 is once, 3 three times; 0.5 is half of the samples, and the other half in the next epoch.
    """

    sources: tuple[Samples, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, samples: "Samples | Mix") -> "Mix":
        """Samples as a mix of one source; a mix as it is."""
        return samples if isinstance(samples, Mix) else cls((samples,), (1.0,))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        source = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.sources[source][number - int(self._firsts[source])]

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.sources[:-1])])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model is fed of each sample, int64."""
        return np.concatenate([source.lengths for source in self.sources])

    def split(self, fraction: float, seed: int) -> tuple["Mix", "Mix"]:
        """(kept, held out): a share of the samples drawn by `seed`, at least one of each."""
        count = len(self)
        if count < 2:
            raise UserError("[data] validation_fraction: one conversation cannot be split; give a validation_path")
        held = np.zeros(count, np.bool_)
        drawn = np.random.default_rng(derived_seed(seed, "held out")).permutation(count)
        held[drawn[: min(count - 1, max(1, round(count * fraction)))]] = True
        return self._where(~held), self._where(held)

    def _where(self, chosen: np.ndarray) -> "Mix":
        parts = [
            (source.take(np.flatnonzero(chosen[first : first + len(source)])), weight)
            for source, first, weight in zip(self.sources, self._firsts, self.weights, strict=True)
        ]
        sources, weights = zip(*(part for part in parts if len(part[0])), strict=True)
        return Mix(sources, weights)


@dataclass
class Batches:
    """The global batches of a run: `global_batch` rows each, reshuffled each epoch; the last of an epoch may be small.

    A row is one sample, or with `row_length` as many as fit into so many tokens. With packing the number of rows, and
    so of steps, may differ by a few from epoch to epoch.

    Args:
        samples: how many there are.
        sources: (number of samples, weight) of each source of a mix, which lie in this order.
        lengths: tokens of each sample; needed for packing only.
    """

    samples: int
    global_batch: int
    seed: int
    sources: tuple[tuple[int, float], ...] = ()
    lengths: np.ndarray | None = None
    row_length: int | None = None
    _counts: dict[int, int] = field(default_factory=dict, repr=False)  # rows of each epoch
    _epochs: dict[int, Rows] = field(default_factory=dict, repr=False)  # the last two asked for

    @classmethod
    def over(cls, mix: Mix, global_batch: int, seed: int, row_length: int | None) -> "Batches":
        """The global batches of a mix, packed where there is a `row_length`."""
        sources = tuple((len(source), weight) for source, weight in zip(mix.sources, mix.weights, strict=True))
        return cls(len(mix), global_batch, seed, sources, mix.lengths, row_length)

    def epoch(self, epoch: int) -> Rows:
        """All rows of an epoch in their order."""
        rows = self._epochs.get(epoch)
        if rows is None:
            numbers = self._order(epoch)
            if self.row_length is None:
                rows = Rows.single(numbers)
            else:
                assert self.lengths is not None
                generator = np.random.default_rng(derived_seed(self.seed, "rows", epoch))
                rows = pack(numbers, self.lengths[numbers], self.row_length).shuffled(generator)
            for old in sorted(self._epochs, key=lambda other: abs(other - epoch))[1:]:
                self._epochs.pop(old, None)  # the loader's thread may be here too
            self._epochs[epoch] = rows
            self._counts[epoch] = len(rows)
        return rows

    def steps(self, epochs: int) -> int:
        """Optimizer steps of the first so many epochs."""
        # Backwards, so that the epochs which are needed first are still there afterwards.
        return sum(self.steps_in(epoch) for epoch in reversed(range(epochs)))

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps in an epoch."""
        if self.row_length is None:
            rows = sum(taken for taken, _ in self._taken())
        else:
            rows = self._counts.get(epoch) or len(self.epoch(epoch))
        return -(-rows // self.global_batch)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, first row) of the step-th global batch, counted from 0 over all epochs."""
        epoch = 0
        if self.row_length is None:
            epoch, step = divmod(step, self.steps_in(0))
        while step and step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step * self.global_batch

    def step_of(self, epoch: int, first: int) -> int:
        """The opposite of `place`."""
        return self.steps(epoch) + first // self.global_batch

    def rows(self, epoch: int, first: int) -> list[np.ndarray]:
        """The sample numbers of each row of the global batch that begins with row `first` of an epoch."""
        rows = self.epoch(epoch)
        return [rows[i] for i in range(first, min(first + self.global_batch, len(rows)))]

    def __getitem__(self, step: int) -> np.ndarray:
        """Sample numbers of the step-th global batch."""
        return np.concatenate(self.rows(*self.place(step)))

    def _taken(self) -> list[tuple[int, int]]:
        """(samples taken in an epoch, samples there are) of each source."""
        sources = self.sources or ((self.samples, 1.0),)
        return [(max(1, round(size * weight)), size) for size, weight in sources]

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch.

        A source is gone through again and again, each time in another order, and an epoch takes the next so many of
        that endless list: so a sample comes up again only when all others have.
        """
        orders = []
        first = 0
        for source, (taken, size) in enumerate(self._taken()):
            rounds = range(epoch * taken // size, ((epoch + 1) * taken - 1) // size + 1)
            seeds = [derived_seed(self.seed, "order", source, one) for one in rounds]
            numbers = np.concatenate([np.random.default_rng(seed).permutation(size) for seed in seeds])
            begin = epoch * taken - rounds[0] * size
            orders.append(first + numbers[begin : begin + taken])
            first += size
        order = np.concatenate(orders)
        if len(orders) > 1:
            np.random.default_rng(derived_seed(self.seed, "mixed", epoch)).shuffle(order)
        return order
