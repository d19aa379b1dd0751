"""From the rows of a global batch to the micro batches of one rank. The loss does not depend on how they are cut."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megasft.data.dataset import Mix
from megasft.data.packing import pack
from megasft.distributed.topology import Topology
from megasft.model.batch import IGNORED, MicroBatch, Segments

Row = int | np.ndarray  # the number of a sample, or of all that share a row


class MicroBatches:
    """The micro batches of this rank, each made of its samples when it is asked for.

    Args:
        rows: of the global batch, the same on every rank.
    """

    def __init__(
        self, samples: Mix, rows: Sequence[Row], per_device_batch: int, topology: Topology, device: torch.device
    ) -> None:
        numbers = [np.atleast_1d(row) for row in rows]
        tokens = np.array([samples.lengths[row].sum() for row in numbers], np.int64)
        cuts = deal(tokens, per_device_batch, topology.sizes.data)[topology.groups.dp.rank()]
        firsts = _firsts(samples, numbers)
        self.samples = [[one for i in cut for one in zip(numbers[i].tolist(), firsts[i], strict=True)] for cut in cuts]
        self._samples, self._multiple, self._device = samples, topology.sizes.tensor, device

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (collate(self._samples, chosen, self._multiple, self._device) for chosen in self.samples)


def _firsts(samples: Mix, rows: Sequence[np.ndarray]) -> list[list[int]]:
    """For each row the place of each sample's first token among all tokens of the rows."""
    lengths = samples.lengths[np.concatenate(rows)]
    firsts = np.split(np.cumsum(lengths) - lengths, np.cumsum([len(row) for row in rows])[:-1])
    return [row.tolist() for row in firsts]


def deal(tokens: np.ndarray, per_device_batch: int, replicas: int) -> list[list[list[int]]]:
    """For each data-parallel rank its micro batches, each a list of at most `per_device_batch` rows.

    Every rank gets as many micro batches as the others, some of them empty where there are too few rows. What is
    computed at the same time is about equally long on all ranks, since the slowest holds up the others: rows are dealt
    from the longest down, a micro batch on every rank at a time, each row to the rank with the fewest tokens so far.

    Args:
        tokens: of each row.
    """
    order = np.argsort(-tokens, kind="stable").tolist()
    at_once = per_device_batch * replicas
    dealt: list[list[list[int]]] = [[] for _ in range(replicas)]
    totals = [0] * replicas
    for first in range(0, len(order), at_once):
        for cuts in dealt:
            cuts.append([])
        for row in order[first : first + at_once]:
            rank = min(
                (rank for rank in range(replicas) if len(dealt[rank][-1]) < per_device_batch),
                key=lambda rank: (totals[rank], len(dealt[rank][-1])),
            )
            dealt[rank][-1].append(row)
            totals[rank] += int(tokens[row])
    return dealt


def evaluation_rows(samples: Mix, row_length: int, replicas: int) -> list[np.ndarray]:
    """All samples packed into rows in the order of the file, shorter ones where every replica is to have some."""
    row_length = min(row_length, -(-int(samples.lengths.sum()) // replicas))
    rows = pack(np.arange(len(samples)), samples.lengths, row_length)
    return [rows[i] for i in range(len(rows))]


def collate(samples: Mix, chosen: Sequence[tuple[int, int]], multiple: int, device: torch.device) -> MicroBatch:
    """Samples laid end to end, padded to a multiple of `multiple` with tokens in a segment of their own.

    The last token of a sample is only ever a target, so it is not fed to the model.

    Args:
        chosen: the number of each sample and the place of its first token in the global batch.
    """
    tokens, labels, places = [], [], []
    for number, first in chosen:
        ids, mask = samples[number]
        tokens.append(ids[:-1].long())
        places.append(torch.arange(first, first + len(ids) - 1))
        labels.append(torch.where(mask[1:], ids[1:].long(), IGNORED))
    lengths = [len(ids) for ids in tokens]
    padding = -sum(lengths) % multiple or (0 if lengths else multiple)
    if padding:
        tokens.append(torch.zeros(padding, dtype=torch.int64))
        labels.append(torch.full((padding,), IGNORED))
        places.append(torch.zeros(padding, dtype=torch.int64))  # whatever is dropped of them, nothing depends on it
        lengths.append(padding)
    targets = torch.cat(labels)
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    return MicroBatch(
        torch.cat(tokens).to(device),
        targets.to(device),
        Segments.of(lengths, device, padding),
        torch.cat(places).to(device),
        supervised.to(device),
    )
