"""Read a Hugging Face checkpoint. Each rank reads only the slices it keeps.

Experts may have either layout: one tensor per expert and projection, as in hub checkpoints, or all experts in one
tensor (`experts.gate_up_proj` [E, 2F, H], `experts.down_proj` [E, H, F]), as transformers 5 holds them in memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from megasft.messages import UserError, warn
from megasft.model import fp8
from megasft.model.hf_config import read_config, read_json
from megasft.model.shape import head_dim, sparse_layers
from megasft.storage.safetensors import TensorFile, TensorSpec
from megasft.storage.shards import Index, Shard, full_index

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # of a matrix, read at a time
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fingerprint(folder: str | Path) -> str:
    """A hash that identifies a base model: of its configuration and of names, shapes, sizes and samples of its weights.

    It reads the header and 64 KiB at 16 evenly spaced offsets of each weight file, so it is fast for any size. Samples
    are enough because further training changes nearly all weights. The path of the folder does not matter.
    """
    config = read_config(folder).to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in sorted(set(Checkpoint(folder).files.values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(2**16))
    return digest.hexdigest()


class Checkpoint:
    """The safetensors files of a model folder, with type and shape of all tensors. Data is read on demand.

    `files` and `specs` have every tensor but the scales of FP8 weights. Raises UserError for missing, corrupted or
    pickled weights, an index that does not match the files, and a quantization that megasft cannot read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self._blocks = fp8.block_size(read_json(folder))
        except UserError as error:
            raise UserError(f"{folder}/config.json: {error}") from None
        self._open: dict[Path, TensorFile] = {}
        self.files = self._files()
        self.specs: dict[str, TensorSpec] = {}
        for path in sorted(set(self.files.values())):
            for name, spec in self._file(path).specs.items():
                self.specs[name] = spec
                self.files.setdefault(name, path)
        for name, path in self.files.items():
            if name not in self.specs:
                raise UserError(
                    f"{self.folder}: the index lists tensor {name!r} in {path.name}, but the file does not contain it"
                )
        self._scales = self._take_scales(self._blocks) if self._blocks else {}

    def _take_scales(self, blocks: fp8.BlockSize) -> dict[str, tuple[Path, str]]:
        """For each FP8 weight, file and name of its scales, which are no longer in `files` and `specs`."""
        scales = {}
        for scale in [name for name in self.specs if name.endswith(fp8.SCALE)]:
            name, shape, path = scale.removesuffix(fp8.SCALE), self.specs.pop(scale).shape, self.files.pop(scale)
            weight = self.specs.get(name)
            if weight is None or weight.dtype != torch.float8_e4m3fn:
                raise UserError(f"{path}: tensor {scale!r} belongs to no FP8 weight")
            if weight.shape != (*shape[:-2], *(n * by for n, by in zip(shape[-2:], blocks, strict=False))):
                raise UserError(
                    f"{path}: tensor {scale!r} has shape {list(shape)}, which does not fit {list(weight.shape)} of "
                    f"{name!r} in blocks of {blocks[0]} x {blocks[1]} (quantization_config in config.json)"
                )
            scales[name] = path, scale
        bare = next((n for n, spec in self.specs.items() if spec.dtype.itemsize == 1 and n not in scales), None)
        if bare:
            raise UserError(f"{self.files[bare]}: tensor {bare!r} is quantized but has no {bare + fp8.SCALE!r}")
        return scales

    def _files(self) -> dict[str, Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.is_file():
            if index.is_file() and b'"model-' in index.read_bytes():
                warn(
                    f"{self.folder}: has both {single.name} and {index.name}: the first is read, as by transformers; "
                    "delete the one that is stale"
                )
            return dict.fromkeys(self._file(single).specs, single)
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {str(name): self.folder / Path(file).name for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index}: cannot be read as a safetensors index ({error})") from None
            missing = sorted({path.name for path in files.values() if not path.is_file()})
            if missing:
                raise UserError(
                    f"{self.folder}: {len(missing)} file(s) of the index are missing, such as {missing[0]}; download "
                    "or copy the model again"
                )
            return files
        pickled = next(self.folder.glob("pytorch_model*.bin"), None)
        if pickled:
            raise UserError(f"{pickled}: pickled weights are never read; convert them to safetensors")
        raise UserError(f"{self.folder}: has no model.safetensors and no model.safetensors.index.json")

    def _file(self, path: Path) -> TensorFile:
        if path not in self._open:
            self._open[path] = TensorFile(path)
        return self._open[path]

    def locate(self, shard: Shard) -> tuple[str, Index]:
        """Where to read a shard: the tensor's name in the files, and the slices of it."""
        for name, index, shape in _candidates(shard):
            if name in self.specs:
                found = self.specs[name].shape
                if len(found) != len(shape) or any(want not in (None, n) for n, want in zip(found, shape, strict=True)):
                    raise UserError(
                        f"{self.files[name]}: tensor {name!r} has shape {list(found)}, but config.json implies "
                        f"{['experts' if n is None else n for n in shape]}"
                    )
                if index[0].stop is not None and index[0].stop > found[0]:
                    raise UserError(
                        f"{self.files[name]}: tensor {name!r} holds {found[0]} experts, but config.json needs more"
                    )
                return name, index
        instead = next((name for name in self.specs if name.startswith(shard.name.removesuffix("weight"))), None)
        raise UserError(
            f"{self.folder}: the checkpoint has no tensor {shard.name!r}, which config.json requires"
            + (f", but {instead!r}; is it quantized? use the model it was quantized from" if instead else "")
        )

    def check_all(self, config: Qwen3MoeConfig) -> None:
        """Raise UserError unless every tensor that the model needs is there, in its shape; reads no data."""
        for name, shape in needed(config):
            self.locate(Shard(name, shape, full_index(*shape), None))
        self.refuse_surplus(config)

    def in_file_order(self) -> list[str]:
        """The names of all tensors, in the order in which the files hold them."""
        return sorted(self.specs, key=lambda name: (path := self.files[name], self._file(path).offsets[name]))

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is dequantized when it is read."""
        return name in self._scales

    def read(self, name: str, index: Index, fp8_as: torch.dtype = torch.float32) -> Tensor:
        """A slice of a tensor, as a view of the file. Only the slice's bytes are read, on first use.

        A slice of one expert of a fused tensor has two dimensions. FP8 weights are dequantized to `fp8_as`.
        """
        piece = self._file(self.files[name]).tensor(name)[index]
        if name in self._scales:
            assert self._blocks is not None
            path, scale = self._scales[name]
            piece = fp8.dequantize(piece, self._file(path).tensor(scale), index, self._blocks, fp8_as)
        return piece[0] if len(index) == 3 else piece

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same values. True if the checkpoint lacks one of them."""
        if name not in self.specs or other not in self.specs:
            return True
        shape = self.specs[name].shape
        if self.specs[other].shape != shape:
            return False
        for first in range(0, shape[0], ROWS):
            rows = (slice(first, min(first + ROWS, shape[0])), *full_index(*shape[1:]))
            if not torch.equal(self.read(name, rows).float(), self.read(other, rows).float()):
                return False
            self.release()
        return True

    def release(self) -> None:
        """Free the memory of the data read so far."""
        for file in self._open.values():
            file.release()

    def refuse_surplus(self, config: Qwen3MoeConfig) -> None:
        """Raise UserError for a tensor that is not part of the architecture in config.json."""
        known = set(expected_names(config))
        surplus = sorted(name for name in self.specs if name not in known)
        if surplus:
            raise UserError(
                f"{self.files[surplus[0]]}: {len(surplus)} tensor(s) are not part of the model that config.json "
                f"describes, such as {surplus[0]!r}"
            )


def untie_different_head(config: Qwen3MoeConfig, checkpoint: Checkpoint) -> None:
    """Set `tie_word_embeddings` to false, and say so, if the checkpoint has a head that is not the embedding.

    transformers 5 does the same. Reads both tensors if there are both.
    """
    if config.tie_word_embeddings and not checkpoint.are_equal(EMBEDDING, HEAD):
        config.tie_word_embeddings = False
        warn(
            f"{checkpoint.folder}: tie_word_embeddings = true in config.json, but {HEAD!r} differs from {EMBEDDING!r}: "
            "they are not tied, as in transformers; set tie_word_embeddings = false there, for other tools may tie them"
        )


def _candidates(shard: Shard) -> Iterator[tuple[str, Index, tuple[int | None, ...]]]:
    """The names that a shard may have in a checkpoint, with its index and shape there (None: any number of experts)."""
    yield shard.name, shard.index, shard.shape
    expert = _EXPERT.fullmatch(shard.name)
    if expert:
        e, kind = int(expert[2]), expert[3]
        rows, columns = shard.index
        (n, k), up = shard.shape, kind == "up"
        if kind == "down":
            yield f"{expert[1]}.down_proj", (slice(e, e + 1), rows, columns), (None, n, k)
        else:
            rows = slice(rows.start + n * up, rows.stop + n * up)
            yield f"{expert[1]}.gate_up_proj", (slice(e, e + 1), rows, columns), (None, 2 * n, k)


def expected_names(config: Qwen3MoeConfig) -> Iterator[str]:
    """All tensor names that a checkpoint of this architecture may contain, in either layout of experts."""
    yield from (EMBEDDING, "model.norm.weight", HEAD)
    for i, sparse in enumerate(sparse_layers(config)):
        layer = f"model.layers.{i}"
        yield from (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"{layer}.self_attn.{name}.weight"
        projections = ("gate_proj", "up_proj", "down_proj")
        if not sparse:
            yield from (f"{layer}.mlp.{name}.weight" for name in projections)
            continue
        yield from (f"{layer}.mlp.gate.weight", f"{layer}.mlp.experts.gate_up_proj", f"{layer}.mlp.experts.down_proj")
        for e in range(config.num_experts):
            yield from (f"{layer}.mlp.experts.{e}.{name}.weight" for name in projections)


def needed(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the model, one for each expert and projection."""
    h, d, vocabulary = config.hidden_size, head_dim(config), config.vocab_size
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    yield from ((EMBEDDING, (vocabulary, h)), ("model.norm.weight", (h,)))
    if not config.tie_word_embeddings:
        yield HEAD, (vocabulary, h)
    for i, sparse in enumerate(sparse_layers(config)):
        layer = f"model.layers.{i}"
        yield from ((f"{layer}.{name}_layernorm.weight", (h,)) for name in ("input", "post_attention"))
        yield from ((f"{layer}.self_attn.{name}_norm.weight", (d,)) for name in "qk")
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        folders, f = [f"{layer}.mlp"], config.intermediate_size
        if sparse:
            folders, f = [f"{layer}.mlp.experts.{e}" for e in range(config.num_experts)], config.moe_intermediate_size
            yield f"{layer}.mlp.gate.weight", (config.num_experts, h)
        for folder in folders:
            for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                yield f"{folder}.{name}_proj.weight", shape
