"""Adapters as files: fresh ones, PEFT's format in and out.

`adapter_model.safetensors` holds one A [r, K] and one B [N, r] for each linear layer, experts one by one
(`base_model.model.model.layers.0.mlp.experts.7.up_proj.lora_A.weight`): the layout peft 0.21 loads onto transformers'
fused experts by itself, and the one vLLM takes for Qwen3-MoE.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasft.errors import UserError
from megasft.lora.linear import leaf
from megasft.model.qwen3_moe import Qwen3Moe, sparse_layers
from megasft.shards import Shard
from megasft.topology import derived_seed

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
SEND_BYTES = 64 * 2**20


def initialize_adapter(model: Qwen3Moe, seed: int) -> None:
    """Fresh adapters as PEFT makes them: A Kaiming-uniform (a = sqrt 5), B zero.

    Each A is drawn whole from a generator of its own, seeded by its name, and sliced: it does not depend on topology.
    """
    for shard in model.adapter_shards():
        if not shard.name.endswith("lora_A.weight"):
            shard.local.zero_()
            continue
        generator = torch.Generator().manual_seed(derived_seed(seed, shard.name))
        bound = 1 / math.sqrt(shard.shape[1])  # kaiming_uniform_(a=sqrt(5)) for fan_in = K
        drawn = torch.empty(shard.shape).uniform_(-bound, bound, generator=generator)
        shard.local.copy_(drawn[shard.index])


def save_adapter(model: Qwen3Moe, folder: str | Path, base_model: str = "") -> None:
    """Write this model's adapters to `folder` in PEFT's format; all ranks call it.

    The ranks send their parts to rank 0 in pieces of 64 MiB and it writes them in place: no rank holds more of the
    adapter than its own part and one piece. The folder appears whole or not at all. `base_model` is the name that peft
    will load the base from. Raises UserError on every rank where rank 0 cannot write.
    """
    topology, folder = model.topology, Path(folder)
    mine = [shard for shard in model.adapter_shards() if shard.writer]
    described = [(PREFIX + shard.name, shard.shape, shard.index) for shard in mine]
    everyone: list[Any] = [None] * topology.world
    dist.gather_object(described, everyone if topology.is_first else None)
    writer: _Writer | None = None
    with topology.together():
        if topology.is_first:
            shapes = {name: shape for part in everyone for name, shape, _ in part} | dict(_zero_filled(model))
            writer = _Writer(folder, shapes, model.config.params_dtype)
    for source in range(topology.world):
        if topology.is_first and writer:
            writer.receive(source, everyone[source], mine)
        elif topology.rank == source:
            for piece in _pieces(mine):
                dist.send(torch.cat([shard.local.detach().cpu().flatten() for shard in piece]), 0)
    with topology.together():
        if writer:
            writer.finish(_peft_config(model, base_model))


def load_adapter(model: Qwen3Moe, folder: str | Path) -> None:
    """Fill this rank's adapters from a PEFT adapter in the per-expert layout, of the same rank, alpha and targets.

    Raises UserError for anything else: another layout, rank, alpha, set of targets or shape, a missing or surplus
    tensor, a value that is not finite, a damaged or a pickled file.
    """
    adapter = _AdapterFile(Path(folder))
    adapter.check(model)
    for shard in model.adapter_shards():
        value = adapter.read(shard)
        if not torch.isfinite(value).all():
            raise UserError(f"{adapter.path}: tensor {PREFIX + shard.name!r} holds values that are not finite")
        shard.local.copy_(value)


def _peft_config(model: Qwen3Moe, base_model: str) -> dict[str, Any]:
    """What `adapter_config.json` must say for peft 0.21 and vLLM to apply every tensor of the file."""
    from peft import LoraConfig

    lora = model.lora
    names = set(lora.targets) | (set(MLP_TARGETS) if _targets_mlp(model) else set())
    dense = _targets_mlp(model) and not all(sparse_layers(model.hf_config))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,  # peft refuses any other for experts; dropout is of training only
        target_modules=sorted(names),
        # peft moves these names from modules to expert parameters; dense layers need them said as parameters.
        target_parameters=[f"mlp.{name}.weight" for name in MLP_TARGETS] if dense else None,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _targets_mlp(model: Qwen3Moe) -> bool:
    return any(name in model.lora.targets for name in MLP_TARGETS)


def _zero_filled(model: Qwen3Moe) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of adapters that were not trained but must be there, as zeros.

    peft fuses gate and up and wraps down around them, and vLLM packs all three: where one is a target, a file without
    the others is refused by both, or, worse, not applied.
    """
    if not _targets_mlp(model):
        return
    config, r = model.hf_config, model.lora.r
    for i, sparse in enumerate(sparse_layers(config)):
        f = config.moe_intermediate_size if sparse else config.intermediate_size
        paths = [f"experts.{e}." for e in range(config.num_experts)] if sparse else [""]
        for name in MLP_TARGETS:
            if name not in model.lora.targets:
                n, k = (config.hidden_size, f) if name == "down_proj" else (f, config.hidden_size)
                for path in paths:
                    yield f"{PREFIX}model.layers.{i}.mlp.{path}{name}.lora_A.weight", (r, k)
                    yield f"{PREFIX}model.layers.{i}.mlp.{path}{name}.lora_B.weight", (n, r)


def _pieces(shards: list[Shard]) -> Iterator[list[Shard]]:
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


@dataclass(frozen=True)
class _Place:
    start: int
    stop: int
    shape: tuple[int, ...]


class _Writer:
    """A safetensors file filled in place, tensor part by tensor part, in a folder that takes its name when whole.

    Format: 8 bytes of header length, a JSON header, the tensors (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.places: dict[str, _Place] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(shapes):
            size = math.prod(shapes[name]) * dtype.itemsize
            self.places[name] = _Place(at, at + size, shapes[name])
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [at, at + size],
            }  # fmt: skip
            at += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            path = self.temporary / WEIGHTS
            with open(path, "wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                file.truncate(file.tell() + at)
            offset = 8 + len(encoded)
            self.data = np.memmap(path, np.uint8, "r+", offset, (at,)) if at else np.zeros(0, np.uint8)
        except OSError as error:
            raise UserError(f"{folder}: the adapter cannot be written ({error.strerror or error})") from None

    def receive(self, source: int, described: list[Any], mine: list[Shard]) -> None:
        """Take the parts of rank `source`, which sends them in the order it described them."""
        if source == 0:
            for (name, _, index), shard in zip(described, mine, strict=True):
                self._put(name, index, shard.local)
            return
        piece: list[Any] = []
        size = 0
        for name, shape, index in described:
            numel = math.prod(s.stop - s.start for s in index)
            piece.append((name, index, numel))
            size += numel
            if size * self.dtype.itemsize >= SEND_BYTES:
                self._receive(source, piece, size)
                piece, size = [], 0
        if piece:
            self._receive(source, piece, size)

    def _receive(self, source: int, piece: list[Any], size: int) -> None:
        buffer = torch.empty(size, dtype=self.dtype)
        dist.recv(buffer, source)
        for (name, index, _), value in zip(piece, buffer.split([numel for *_, numel in piece]), strict=True):
            self._put(name, index, value.view([s.stop - s.start for s in index]))

    def _put(self, name: str, index: Any, value: Tensor) -> None:
        place = self.places[name]
        whole = torch.from_numpy(self.data[place.start : place.stop]).view(self.dtype).view(place.shape)
        whole[index] = value.detach().to("cpu", self.dtype)

    def finish(self, config: dict[str, Any]) -> None:
        """Flush to disk and give the folder its name, in place of any adapter of that name."""
        try:
            if isinstance(self.data, np.memmap):
                self.data.flush()
            (self.temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            for path in (*self.temporary.iterdir(), self.temporary):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            self.temporary.chmod(0o755)
            if self.folder.exists():
                retired = self.temporary.with_suffix(".old")
                self.folder.rename(retired)
                self.temporary.rename(self.folder)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                self.temporary.rename(self.folder)
        except OSError as error:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise UserError(f"{self.folder}: the adapter cannot be written ({error.strerror or error})") from None


class _AdapterFile:
    """A PEFT adapter folder, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / WEIGHTS
        try:
            self.config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            kind = self.config.get("peft_type")
        except FileNotFoundError:
            raise UserError(f"{folder}: not an adapter folder: it has no {CONFIG}") from None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / CONFIG}: not a readable adapter configuration ({error})") from None
        if kind != "LORA":
            raise UserError(f"{folder / CONFIG}: peft_type = {kind!r}; only LORA adapters can be trained on")
        if not self.path.is_file() and (folder / "adapter_model.bin").exists():
            raise UserError(f"{folder}/adapter_model.bin: pickled adapters are never read; save it as {WEIGHTS}")
        try:
            self.file = safe_open(self.path, framework="pt")
            self.names = set(self.file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: missing, damaged or not a safetensors file ({error})") from None

    def check(self, model: Qwen3Moe) -> None:
        """Raise UserError unless this is an adapter of exactly this model's rank, alpha, targets and layers."""
        for key, want, section in (("r", model.lora.r, "r"), ("lora_alpha", model.lora.alpha, "alpha")):
            if self.config.get(key) != want:
                raise UserError(
                    f"{self.folder / CONFIG}: {key} = {self.config.get(key)!r}, but [lora] {section} = {want!r}; "
                    "set both alike to go on from this adapter"
                )
        if any(".experts.lora_" in name or ".experts.base_layer." in name for name in self.names):
            raise UserError(f"{self.path}: holds fused experts; megasft starts from adapters with one pair per expert")
        present = {leaf(name.rpartition(".lora_")[0]) for name in self.names}
        extra = {leaf(name.rpartition(".lora_")[0]) for name in self.names if self._adds(name, model.lora.targets)}
        if extra or not present >= model.lora.targets:
            raise UserError(
                f"{self.path}: adapts {', '.join(sorted((present & model.lora.targets) | extra))}, but [lora] "
                f"target_modules asks for {', '.join(sorted(model.lora.targets))}"
            )
        for shard in model.adapter_shards():
            name = PREFIX + shard.name
            if name not in self.names:
                raise UserError(f"{self.path}: has no tensor {name!r}: an adapter of another model?")
            shape = tuple(self.file.get_slice(name).get_shape())
            if shape != shard.shape:
                raise UserError(
                    f"{self.path}: tensor {name!r} has shape {list(shape)}, this model needs {list(shard.shape)}"
                )
        foreign = sorted(self.names - set(_all_names(model)))
        if foreign:
            raise UserError(f"{self.path}: tensor {foreign[0]!r} has no place in this model: an adapter of another one?")

    def _adds(self, name: str, targets: frozenset[str]) -> bool:
        """Whether a tensor adapts a layer beyond the targets: more than the zeros that are written for peft's sake."""
        stem = name.rpartition(".lora_")[0]
        other = f"{stem}.lora_B.weight"
        return leaf(stem) not in targets and (other not in self.names or bool(self.file.get_tensor(other).any()))

    def read(self, shard: Shard) -> Tensor:
        """The part of a tensor that this rank keeps."""
        try:
            return self.file.get_slice(PREFIX + shard.name)[shard.index]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: tensor {PREFIX + shard.name!r} cannot be read ({error})") from None


def _all_names(model: Qwen3Moe) -> Iterator[str]:
    """Every name an adapter of this model may hold, on any rank, trained or filled."""
    for i, sparse in enumerate(sparse_layers(model.hf_config)):
        stems = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        if sparse:
            stems += ["mlp.gate"]
            stems += [f"mlp.experts.{e}.{name}" for e in range(model.hf_config.num_experts) for name in MLP_TARGETS]
        else:
            stems += [f"mlp.{name}" for name in MLP_TARGETS]
        for stem in stems:
            yield from (f"{PREFIX}model.layers.{i}.{stem}.lora_{matrix}.weight" for matrix in "AB")
