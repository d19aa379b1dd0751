"""Initialize, load and save a model's adapters. Each rank handles its own shards."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasft.adapters.adapter_file import AdapterFile, AdapterWriter, Pair
from megasft.adapters.fit import fitting_pairs
from megasft.adapters.peft_layout import LayoutName, stem
from megasft.distributed.topology import derived_seed
from megasft.messages import UserError
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.storage.safetensors import all_finite
from megasft.storage.shards import Shard

SEND_BYTES = 64 * 2**20


def initialize_adapter(model: Qwen3Moe, seed: int) -> None:
    """Initialize adapters as PEFT does: A Kaiming-uniform (a = sqrt 5), B zero.

    Each full A is drawn from its own generator, seeded by its name, and then sliced, so that values do not depend on
    the topology.
    """
    for shard in model.adapter_shards():
        shard.local.copy_(_fresh(shard, seed))


def load_adapter(model: Qwen3Moe, folder: str | Path, seed: int = 0) -> None:
    """Load this rank's shards of a PEFT adapter with the model's r, alpha and targets, in either layout.

    If some layers of the adapter have their own r (peft doubles it for fused gate and up, which then share A), the
    model's r must be the largest of them. Adapters with a smaller r are extended with new rows of A, drawn from `seed`,
    and zero columns of B. If some have their own alpha / r (`alpha_pattern`), their B is multiplied so that the model's
    alpha / r gives the same update. The model's output does not change, and every layer trains with the full r.

    Raises UserError for a different r, alpha, set of targets or shape, a missing or surplus tensor, a value that is not
    finite, and a corrupted or pickled file. Everything but the values is checked before anything is copied.
    """
    adapter = AdapterFile(folder)
    pairs = fitting_pairs(adapter, model.lora, model.hf_config)
    for shard in model.adapter_shards():
        _copy_shard(shard, adapter, pairs[stem(shard.name)], model.lora.alpha / model.lora.r, seed)


def save_adapter(model: Qwen3Moe, folder: str | Path, base_model: str = "", layout: LayoutName = "per-expert") -> None:
    """Write this model's adapters to `folder` in PEFT's format. All ranks must call it.

    The ranks send their shards to rank 0 in pieces of 64 MiB, and rank 0 writes them in place. No rank holds more of
    the adapter than its own shards and one piece. The folder appears complete or not at all. peft loads the base from
    `base_model`; `peft_layout` describes `layout`. Raises UserError on all ranks if rank 0 cannot write.
    """
    topology = model.topology
    mine = [shard for shard in model.adapter_shards() if shard.writer]
    described = [(shard.name, shard.shape, shard.index) for shard in mine]
    everyone: list[Any] = [None] * topology.world
    dist.gather_object(described, everyone if topology.is_first else None)
    writer: AdapterWriter | None = None
    with topology.together():
        if topology.is_first:
            shapes = {name: shape for part in everyone for name, shape, _ in part}
            r, alpha, dtype = model.lora.r, model.lora.alpha, model.config.params_dtype
            writer = AdapterWriter(folder, shapes, dtype, r, alpha, layout, base_model)
    try:
        for source in range(topology.world):
            if writer:
                _receive(writer, source, everyone[source], mine)
            elif topology.rank == source:
                for piece in _pieces(mine):
                    dist.send(torch.cat([shard.local.detach().cpu().flatten() for shard in piece]), 0)
    except BaseException:
        if writer:
            writer.discard()
        raise
    with topology.together():
        if writer:
            writer.finish()


def is_zero(model: Qwen3Moe) -> bool:
    """Whether the adapters change nothing: every B, on all ranks, is zero. All ranks call it."""
    learned = any(bool(shard.local.any()) for shard in model.adapter_shards() if shard.name.endswith("lora_B.weight"))
    answers: list[Any] = [None] * model.topology.world
    dist.all_gather_object(answers, learned)
    return not any(answers)


def _fresh(shard: Shard, seed: int) -> Tensor:
    if not shard.name.endswith("lora_A.weight"):
        return torch.zeros(shard.local.shape)
    generator = torch.Generator().manual_seed(derived_seed(seed, shard.name))
    bound = 1 / math.sqrt(shard.shape[1])  # kaiming_uniform_(a=sqrt(5)) for fan_in = K
    return torch.empty(shard.shape).uniform_(-bound, bound, generator=generator)[shard.index]


def _copy_shard(shard: Shard, adapter: AdapterFile, pair: Pair, scaling: float, seed: int) -> None:
    """Copy this rank's slice of an adapter tensor. `scaling` is the alpha / r of the model."""
    rows, columns = shard.index
    factor = 1.0
    if shard.name.endswith("lora_A.weight"):
        place, index, local = pair.A, (slice(0, pair.r), columns), shard.local[: pair.r]
    else:
        place, index, local = pair.B, (rows, slice(0, pair.r)), shard.local[:, : pair.r]
        _check_block(shard, adapter, pair, rows, scaling)
        factor = 1.0 if math.isclose(pair.scaling, scaling) else pair.scaling / scaling
    value = adapter.tensor(place)[index]
    if not all_finite(value):
        raise UserError(f"{adapter.path}: tensor {place.name!r} holds values that are not finite")
    if pair.r < shard.shape[0 if place is pair.A else 1]:
        shard.local.copy_(_fresh(shard, seed))
    local.copy_(value if factor == 1 else value.float() * factor)


def _check_block(shard: Shard, adapter: AdapterFile, pair: Pair, rows: slice, scaling: float) -> None:
    """Raise UserError if `pair` is one half of a fused B that is not block-diagonal in this rank's rows."""
    place = pair.B
    if len(place.split) != 5:
        return
    half, _, _, _, e = place.index
    other = replace(place, index=(half, rows, 1 - half, slice(None), e))  # type: ignore[operator]
    if adapter.tensor(other).any():
        r, alpha = 2 * pair.r, 2 * pair.r * scaling
        raise UserError(
            f"{adapter.path}: gate and up share an A of rank {r} (B of {place.name!r} is not block-diagonal); "
            f"set [lora] r = {r} and alpha = {alpha:g} to continue from this adapter"
        )


def _pieces(shards: list[Shard]) -> Iterator[list[Shard]]:
    """Shards in groups of about SEND_BYTES, each sent as one message."""
    piece: list[Shard] = []
    size = 0
    for shard in shards:
        piece.append(shard)
        size += shard.local.numel() * shard.local.element_size()
        if size >= SEND_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _receive(writer: AdapterWriter, source: int, described: list[Any], mine: list[Shard]) -> None:
    """Receive the shards of rank `source`, which sends them in the order in which it described them."""
    if source == 0:
        for shard in mine:
            writer.put(shard.name, shard.index, shard.local)
        return
    piece: list[Any] = []
    size = 0
    for name, _, index in described:
        numel = math.prod(s.stop - s.start for s in index)
        piece.append((name, index, numel))
        size += numel
        if size * writer.dtype.itemsize >= SEND_BYTES:
            _receive_piece(writer, source, piece, size)
            piece, size = [], 0
    if piece:
        _receive_piece(writer, source, piece, size)


def _receive_piece(writer: AdapterWriter, source: int, piece: list[Any], size: int) -> None:
    buffer = torch.empty(size, dtype=writer.dtype)
    dist.recv(buffer, source)
    for (name, index, _), value in zip(piece, buffer.split([numel for *_, numel in piece]), strict=True):
        writer.put(name, index, value.view([s.stop - s.start for s in index]))
    writer.file.release()
