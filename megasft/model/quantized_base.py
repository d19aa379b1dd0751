"""The disk cache of 4-bit checkpoints: quantized once, matrix by matrix, and usable under every topology.

    CACHE/nf4/<key>/layer-00000.safetensors   one file per layer; per projection, stacked over experts (1 if dense),
                                              <name>.packed, .scales, .groups, .mean as in `nf4`, and <name>.sums,
                                              int64 [E, fields]: a checksum of each field and of its position
                    manifest.json             the checkpoint and settings it was made from, and the file sizes
    CACHE/digests/                            see `storage.digests`

The key is a hash of the checkpoint's content, so copies of a checkpoint and other paths to it share one folder.
"""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from megasft.config.schema import QuantSettings
from megasft.messages import UserError, say_once
from megasft.model.hf_checkpoint import Checkpoint
from megasft.model.shape import head_dim, sparse_layers
from megasft.quant import kernels, nf4
from megasft.quant.nf4 import Quantized
from megasft.storage.digests import cached_sha256
from megasft.storage.disk_cache import default_cache_dir, make_once
from megasft.storage.safetensors import RELEASE_BYTES, TensorFile, TensorFileWriter, TensorSpec
from megasft.storage.shards import Shard, full_index

MANIFEST = "manifest.json"
REPORT_SECONDS = 10.0
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj\.weight|mlp\.(experts\.\d+\.)?(gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(gate_up|down)_proj)"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def prepare(model: str | Path, config: Qwen3MoeConfig, settings: QuantSettings, workers: int | None = None) -> Path:
    """The cache folder of the quantized checkpoint in `model`; quantizes the checkpoint first if the folder is missing.

    A folder that is incomplete or belongs to another checkpoint is rebuilt. Each of `workers` threads, by default one
    per core, needs the memory of one matrix and its codes.

    Raises UserError for a tensor that is missing, has another shape or cannot be quantized (see `nf4.quantize`), a
    checkpoint that changes meanwhile, and a cache that cannot be written.
    """
    kernels.require()
    checkpoint, path = Checkpoint(model), Path(model)
    root = Path(settings.cache_dir or default_cache_dir()).expanduser()
    files = [path / "config.json", *sorted(set(checkpoint.files.values()))]
    digests = _digests(files, root)
    key = _key(settings, digests)
    folder = root / "nf4" / key

    def make(part: Path) -> None:
        _quantize(checkpoint, config, settings, key, part, workers or len(os.sched_getaffinity(0)))
        if _digests(files, root) != digests:
            raise UserError(f"{model}: changed while it was read; start the command again")
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        described = {"key": key, "quantized": str(path.absolute()), "settings": _format(settings), "files": sizes}
        (part / MANIFEST).write_text(json.dumps(described, indent=2), encoding="utf-8")

    try:
        return make_once(
            folder, lambda found: _usable(found, config), make, f"{model}: waiting for another run that quantizes it"
        )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"[quant] cache_dir: {root} cannot be written ({reason}); set another folder") from None


class QuantizedCheckpoint:
    """A complete cache folder. `matrix` returns views of the files and verifies their checksums."""

    def __init__(self, folder: Path, config: Qwen3MoeConfig, settings: QuantSettings) -> None:
        self.folder = folder
        self._specs = [_file_specs(stacks, settings) for stacks in quantized_layers(config)]
        self._open: dict[int, TensorFile] = {}

    def matrix(self, name: str) -> Quantized:
        """The quantized matrix of the checkpoint tensor `name`. Raises UserError if it is corrupted."""
        stack, e = _stack_of(name)
        file = self._file(int(_LAYER.match(name)[1]))  # type: ignore[index]
        fields = [field for field in ("packed", "scales", "groups", "mean") if f"{stack}.{field}" in file.specs]
        found = {field: file.tensor(f"{stack}.{field}")[e] for field in fields}
        if not torch.equal(_sums(found, f"{self.folder.name}/{name}"), file.tensor(f"{stack}.sums")[e]):
            raise self._corrupted(f"{file.path}: {name!r} is corrupted: its checksum does not match")
        return found

    def release(self) -> None:
        """Free the memory of the data read so far."""
        for file in self._open.values():
            file.release()

    def _file(self, layer: int) -> TensorFile:
        if layer not in self._open:
            path = self.folder / _file_name(layer)
            try:
                file = TensorFile(path)
            except UserError as error:
                raise self._corrupted(str(error)) from None
            if file.specs != self._specs[layer]:
                raise self._corrupted(f"{path}: corrupted: its tensors are not the ones that were written")
            self._open[layer] = file
        return self._open[layer]

    def _corrupted(self, what: str) -> UserError:
        return UserError(f"{what}; delete {self.folder}, and the next run rebuilds it")


def quantized_layers(config: Qwen3MoeConfig) -> Iterator[list[tuple[str, tuple[int, int, int]]]]:
    """For each layer, its quantized projections: name and [E, N, K]."""
    h, d = config.hidden_size, head_dim(config)
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    attention = {"q_proj": (1, q, h), "k_proj": (1, kv, h), "v_proj": (1, kv, h), "o_proj": (1, h, q)}
    for i, sparse in enumerate(sparse_layers(config)):
        found = [(f"model.layers.{i}.self_attn.{name}", shape) for name, shape in attention.items()]
        experts, f = (config.num_experts, config.moe_intermediate_size) if sparse else (1, config.intermediate_size)
        path = f"model.layers.{i}.mlp.experts" if sparse else f"model.layers.{i}.mlp"
        for name, shape in (("gate_proj", (f, h)), ("up_proj", (f, h)), ("down_proj", (h, f))):
            found.append((f"{path}.{name}", (experts, *shape)))
        yield found


def quantize_dequantize(name: str, matrix: Tensor, settings: QuantSettings, dtype: torch.dtype) -> Tensor:
    """The values that a QLoRA model of this dtype (bf16 or fp32) computes with in place of the checkpoint tensor
    `name`, or of one expert of a fused tensor. Returns tensors that are not quantized unchanged.
    """
    if not _QUANTIZED.fullmatch(name):
        return matrix
    halves = matrix.chunk(2) if name.endswith("gate_up_proj") else (matrix,)
    return torch.cat([nf4.dequantize(nf4.quantize(half, settings, name), settings, dtype) for half in halves])


def _quantize(
    checkpoint: Checkpoint, config: Qwen3MoeConfig, settings: QuantSettings, key: str, folder: Path, workers: int
) -> None:
    layers = list(quantized_layers(config))
    places = {}
    for stack, (experts, n, k) in (one for layer in layers for one in layer):
        for e in range(experts):
            name = _matrix_name(stack, e)
            places[name] = checkpoint.locate(Shard(name, (n, k), full_index(n, k), None))
    last = time.monotonic()
    # One thread per matrix, and one inside torch: a matrix is too little work to split.
    with nf4.one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for i, stacks in enumerate(layers):
                writer = TensorFileWriter(folder / _file_name(i), _file_specs(stacks, settings))

                def put(one: tuple[str, int], writer: TensorFileWriter = writer) -> int:
                    stack, e = one
                    name = _matrix_name(stack, e)
                    matrix = checkpoint.read(*places[name], fp8_as=torch.bfloat16)
                    quantized = nf4.quantize(matrix, settings, name)
                    for field, value in quantized.items():
                        writer.write(f"{stack}.{field}", (slice(e, e + 1),), value[None])
                    writer.write(f"{stack}.sums", (slice(e, e + 1),), _sums(quantized, f"{key}/{name}")[None])
                    return matrix.nbytes

                touched = 0
                for size in pool.map(put, [(stack, e) for stack, shape in stacks for e in range(shape[0])]):
                    touched += size
                    if touched >= RELEASE_BYTES:
                        checkpoint.release()
                        touched = 0
                writer.close()
                checkpoint.release()
                if time.monotonic() - last > REPORT_SECONDS:
                    last = time.monotonic()
                    say_once(f"{checkpoint.folder}: {i + 1} of {len(layers)} layers quantized")
        finally:
            pool.shutdown(cancel_futures=True)


def _file_specs(stacks: list[tuple[str, tuple[int, int, int]]], settings: QuantSettings) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for stack, shape in stacks:
        fields = nf4.specs(shape, settings)
        specs |= {f"{stack}.{field}": spec for field, spec in fields.items()}
        specs[f"{stack}.sums"] = TensorSpec(torch.int64, (shape[0], len(fields)))
    return specs


def _usable(folder: Path, config: Qwen3MoeConfig) -> Path | None:
    """The folder if it exists and is complete. Corrupted values are detected later, when they are read."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != folder.name:
            say_once(f"{folder}: belongs to another checkpoint ({manifest['quantized']}); rebuilding it")
            return None
        for name in map(_file_name, range(config.num_hidden_layers)):
            if (folder / name).stat().st_size != manifest["files"][name]:
                say_once(f"{folder / name}: has another size than when it was written; rebuilding {folder}")
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say_once(f"{folder}: is an incomplete quantized checkpoint ({error}); rebuilding it")
        return None
    return folder


def _digests(files: list[Path], root: Path) -> list[str]:
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(lambda file: cached_sha256(file, root), files))
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: cannot be read ({error.strerror})") from None


def _key(settings: QuantSettings, digests: list[str]) -> str:
    """A hash of everything that determines the values: the checkpoint, the format, and the code that quantizes."""
    code = [Path(str(module)).read_bytes() for module in (nf4.__file__, __file__)]
    parts: list[Any] = [hashlib.sha256(b"".join(code)).hexdigest(), _format(settings), digests]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _format(settings: QuantSettings) -> dict[str, Any]:
    return settings.model_dump(include={"type", "double", "block_size"})


def _file_name(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


def _matrix_name(stack: str, e: int) -> str:
    path, _, leaf = stack.rpartition(".")
    return f"{path}.{e}.{leaf}.weight" if path.endswith(".experts") else f"{stack}.weight"


def _stack_of(name: str) -> tuple[str, int]:
    stem = name.removesuffix(".weight")
    expert = _EXPERT.fullmatch(stem)
    return (f"{expert[1]}.{expert[3]}", int(expert[2])) if expert else (stem, 0)


def _sums(quantized: Quantized, key: str) -> Tensor:
    """int64 [fields]: a checksum of each field. It covers `key` and the field's name, so moved data does not match."""
    return torch.stack([_sum(value, f"{key}/{field}") for field, value in quantized.items()])


_PIECE = 2**18  # words per piece: 2 MiB of hash weights, and 2 MiB for the piece as int64
_STEP = 6364136223846793005  # multiplier between pieces: Knuth's, odd


def _sum(value: Tensor, key: str) -> Tensor:
    """int64 []: a number derived from `key`, plus each 32-bit word times the weight of its position, modulo 2^64.

    Multilinear hashing (Lemire and Kaser 2014, https://arxiv.org/abs/1202.4961). The weights are odd, so a change of
    one word always changes the sum. Words have half the bits of the sum, because changes in the upper bits of two words
    would otherwise cancel.
    """
    data = value.contiguous().view(-1).view(torch.uint8)
    if len(data) % 4 or data.storage_offset() % 4:  # torch needs aligned words
        data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    digest = hashlib.sha256(key.encode()).digest()
    total = torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
    for piece in data.view(torch.int32).split(_PIECE):
        total = total * _STEP + torch.dot(piece.long(), _weights()[: len(piece)])
    return total


@functools.cache
def _weights() -> Tensor:
    """int64 [_PIECE]: odd numbers, by splitmix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195)."""
    found = torch.arange(1, _PIECE + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        found = (found ^ (found >> shift & 2 ** (64 - shift) - 1)) * factor  # the mask removes shifted-in sign bits
    return found | 1
