"""Held-out conversations as the trainer would take them: samples, what targets are part of, where they come from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megasft.config.schema import RunConfig
from megasft.data.account import Account, Place, Tally
from megasft.data.dataset import Samples
from megasft.data.records import conversation_files
from megasft.data.tokenize import Recipe, Tokens, tokenize_files
from megasft.data.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class HeldOut:
    """The conversations of a file or folder.

    Attributes:
        parts: int32, of each token of `samples` what it is part of (`Encoded.parts`).
        conversations: where each conversation is that has a sample.
        of: int64 [samples], the number of the conversation that a sample is of; `split_turns` makes several of one.
    """

    files: list[Path]
    samples: Samples
    parts: np.ndarray
    conversations: list[Place]
    of: np.ndarray
    account: Account


def read_held_out(path: str | Path, tokenizer: ChatTokenizer, config: RunConfig) -> HeldOut:
    """Read and tokenize conversations as training would, with the run's `[data]` and `sequence_length`.

    Says on standard error what was skipped and cut. Raises UserError as training would.
    """
    files, recipe = conversation_files(path), Recipe.of(config)
    tally = Tally(files)
    blocks: list[Tokens] = []
    places = [np.zeros(0, np.int64)]
    for block in tokenize_files(files, tokenizer, recipe):
        blocks.append(block)
        places.append(tally.places(block))
        tally.add(block)
    account = tally.account()
    account.report(path, files, recipe, config.data.on_error)
    ids, mask, parts, lengths = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("ids", "mask", "parts", "lengths")
    )
    unique, of = np.unique(np.concatenate(places), return_inverse=True)
    samples = Samples(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(lengths.cumsum()))
    return HeldOut(files, samples, parts, [Place.of(int(one)) for one in unique], of, account)
