"""Tokenized samples in three flat arrays, and the global batches, micro batches and tensors cut from them.

Which samples make up step t depends on the seed, the epoch and the global batch size only, never on the topology.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megasft import host
from megasft.data.conversations import Conversation, Problem, read_conversations
from megasft.data.template import Encoded, encode_many, fit
from megasft.data.tokenizer import ChatTokenizer
from megasft.errors import UserError
from megasft.model.attention import Segments
from megasft.model.qwen3_moe import IGNORED, MicroBatch
from megasft.topology import Topology, derived_seed


@dataclass(frozen=True)
class Samples:
    """Conversations as tokens: sample i is ids[ends[i-1]:ends[i]] (int32) with mask (bool), True for targets."""

    ids: Tensor
    mask: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = int(self.ends[i - 1]) if i else 0
        return self.ids[start : self.ends[i]], self.mask[start : self.ends[i]]

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> "Samples":
        """Lay encoded conversations end to end."""
        lengths = torch.tensor([len(one) for one in encoded], dtype=torch.int64)
        ids = np.concatenate([one.ids for one in encoded]) if encoded else np.zeros(0, np.int32)
        mask = np.concatenate([one.mask for one in encoded]) if encoded else np.zeros(0, bool)
        return cls(torch.from_numpy(ids), torch.from_numpy(mask), lengths.cumsum(0))

    def split(self, fraction: float, seed: int) -> tuple["Samples", "Samples"]:
        """(kept, held out): a share of the samples drawn by `seed`, at least one of each."""
        if len(self) < 2:
            raise UserError("[data] validation_fraction: one conversation cannot be split; give a validation_path")
        held = min(len(self) - 1, max(1, round(len(self) * fraction)))
        order = np.random.default_rng(derived_seed(seed, "held out")).permutation(len(self))
        return self.take(sorted(order[held:])), self.take(sorted(order[:held]))

    def take(self, indices: Sequence[int]) -> "Samples":
        """The samples of these numbers."""
        parts = [self[int(i)] for i in indices]
        lengths = torch.tensor([len(ids) for ids, _ in parts], dtype=torch.int64)
        return Samples(torch.cat([ids for ids, _ in parts]), torch.cat([mask for _, mask in parts]), lengths.cumsum(0))


def load_samples(path: str | Path, tokenizer: ChatTokenizer, sequence_length: int) -> Samples:
    """Read and tokenize a conversation file. Raises UserError naming the first problem and how many there are."""
    encoded: list[Encoded] = []
    problems: list[Problem] = []
    waiting: list[Conversation] = []

    def flush() -> None:
        for one in encode_many(waiting, tokenizer):
            if isinstance(one, Problem):
                problems.append(one)
            else:
                encoded.extend(fit(one, sequence_length))
        waiting.clear()

    for record in read_conversations(path):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        waiting.append(record)
        if len(waiting) == 1024:
            flush()
    flush()
    if problems:
        more = f" (and {len(problems) - 1} more problems; `megasft validate` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")
    if not encoded:
        raise UserError(f"{path}: no conversation with something to learn from")
    return Samples.of(encoded)


def share_samples(samples: Samples | None, topology: Topology) -> Samples:
    """What rank 0 holds, on every rank."""
    sizes = torch.tensor([len(samples.ids), len(samples)] if samples else [0, 0])
    dist.broadcast(sizes, 0)
    tokens, count = sizes.tolist()
    if samples is None:
        empty = torch.empty
        samples = Samples(empty(tokens, dtype=torch.int32), empty(tokens, dtype=torch.bool), empty(count, dtype=torch.int64))
    for tensor in (samples.ids, samples.mask, samples.ends):
        dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, 0)
    return samples


@dataclass(frozen=True)
class Batches:
    """The global batches of a run: every sample once an epoch, reshuffled each epoch; the last of an epoch may be small."""

    samples: int
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.samples // self.global_batch)

    def __getitem__(self, step: int) -> np.ndarray:
        """Sample numbers of the step-th global batch, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(derived_seed(self.seed, "order", epoch)).permutation(self.samples)
        return order[within * self.global_batch : (within + 1) * self.global_batch]


def micro_batches(
    samples: Samples, numbers: Sequence[int], per_device_batch: int, topology: Topology
) -> list[MicroBatch]:
    """This rank's share of a global batch: as many micro batches on every data-parallel rank, empty ones at the end."""
    cuts = [numbers[i : i + per_device_batch] for i in range(0, len(numbers), per_device_batch)]
    data = topology.sizes.data
    mine = cuts[topology.groups.dp.rank() :: data]
    mine += [[]] * (-(-len(cuts) // data) - len(mine))
    return [collate(samples, cut, topology.sizes.tensor) for cut in mine]


def collate(samples: Samples, numbers: Sequence[int], multiple: int) -> MicroBatch:
    """Samples laid end to end, filled up to a multiple of `multiple` with tokens in a segment of their own.

    The last token of a sample is only ever a target, so it is not fed to the model.
    """
    tokens, labels = [], []
    for number in numbers:
        ids, mask = samples[int(number)]
        tokens.append(ids[:-1].long())
        labels.append(torch.where(mask[1:], ids[1:].long(), IGNORED))
    lengths = [len(ids) for ids in tokens]
    filling = -sum(lengths) % multiple or (0 if lengths else multiple)
    if filling:
        tokens.append(torch.zeros(filling, dtype=torch.int64))
        labels.append(torch.full((filling,), IGNORED))
        lengths.append(filling)
    device = host.device()
    return MicroBatch(torch.cat(tokens).to(device), torch.cat(labels).to(device), Segments.of(lengths, device))


def token_counts(samples: Samples, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(tokens fed to the model, supervised tokens) of each sample."""
    for number in numbers:
        ids, mask = samples[int(number)]
        yield len(ids) - 1, int(mask[1:].sum())
