"""Merge an adapter into its base checkpoint: W + alpha / r * B A, tensor by tensor, for models of any size.

Files are memory-mapped and processed in pieces, so memory holds one piece of one tensor at a time.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megasft.adapters.adapter_file import AdapterFile, Pair
from megasft.adapters.peft_layout import Shape
from megasft.config.schema import QuantSettings
from megasft.messages import UserError, size
from megasft.model import fp8
from megasft.model.hf_checkpoint import EMBEDDING, HEAD, Checkpoint
from megasft.model.hf_config import read_json
from megasft.model.quantized_base import quantize_dequantize
from megasft.storage.new_folder import NewFolder
from megasft.storage.safetensors import TensorFileWriter, TensorSpec, all_finite
from megasft.storage.shards import full_index

MergeDtype = Literal["keep", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PIECE_BYTES = 64 * 2**20  # of fp32
RELEASE_BYTES = 256 * 2**20  # file pages touched before they are released
# Files copied along with the weights: configuration, tokenizer, chat templates, licence, but not the base's model card.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "additional_chat_templates/*")

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote: counts of tensors, adapted tensors and files, bytes of tensor data, and adapted routers."""

    tensors: int
    adapted: int
    files: int
    nbytes: int
    routers: int


@dataclass(frozen=True)
class _Delta:
    """An adapter and where to add it in a base tensor: `rows` of the tensor, or of its expert `e`."""

    pair: Pair
    rows: slice
    e: int | None = None


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: MergeDtype = "keep",
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    onto: QuantSettings | None = None,
    trained_in: Literal["bf16", "fp32"] = "bf16",
) -> MergeReport:
    """Write the model folder `out`: the checkpoint in `model` with `adapter` merged in, and its companion files.

    Experts keep the base's layout; tensors take `dtype`, or with "keep" the base's own. Sums are computed in fp32 and
    rounded once. `progress` receives the bytes written so far and their total. With `onto`, the adapter is added not to
    the checkpoint's weights but to those that a QLoRA run with these settings computed with: quantized to 4 bits and
    dequantized to `trained_in`. `out` appears complete or not at all.

    Raises UserError for an adapter of another model or with values that are not finite, a corrupted file, a quantized
    base, an `out` that holds files, and too little disk space. All of these are checked before any tensor is written; a
    weight that is not finite is found when it is merged.
    """
    base, lora = Checkpoint(model), AdapterFile(adapter)
    deltas = _deltas(base, lora)
    lora.require_finite()
    specs = {name: _output_spec(base, name, name in deltas, dtype) for name in base.in_file_order()}
    shards = _shards(specs, max_shard_bytes)
    companions = _companions(base.folder)
    total = sum(spec.nbytes for spec in specs.values())
    _check_room(Path(out), total + sum(path.stat().st_size for path in companions))
    with NewFolder(out, replace=False) as folder:
        _write_companions(base.folder, companions, folder.path, _merged_config(base, dtype))
        _write_index(shards, specs, folder.path)
        done = touched = 0
        for file, names in shards.items():
            writer = TensorFileWriter(folder.path / file, {name: specs[name] for name in names})
            for name in names:
                for piece, value in _merged(
                    base, name, deltas.get(name, []), lora, specs[name].dtype, onto, DTYPES[trained_in]
                ):
                    if not all_finite(value):
                        raise UserError(
                            f"{base.files[name]}: merged with the adapter, tensor {name!r} holds values that are not "
                            "finite; repair the checkpoint, or download or copy the model again"
                        )
                    writer.write(name, piece, value)
                    touched += value.nbytes
                    if touched >= RELEASE_BYTES:
                        base.release()
                        lora.file.release()
                        touched = 0
                done += specs[name].nbytes
                progress(done, total)
            writer.close()
    return MergeReport(len(specs), len(deltas), len(shards), total, len(lora.routers()))


def find_base(adapter: str | Path) -> str:
    """The base model that an adapter's configuration names. Raises UserError if it names none."""
    name = AdapterFile(adapter).config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: the adapter's configuration names no base model; pass --model")
    return str(name)


def parse_size(text: str) -> int:
    """Bytes in "5GB" or "500 MiB". Raises UserError."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise UserError(f"{text!r} is not a size; write it as 5GB or 500MiB")
    return size


def _deltas(base: Checkpoint, lora: AdapterFile) -> dict[str, list[_Delta]]:
    """The adapters to add to each base tensor. Raises UserError for an adapter that matches no base tensor."""
    deltas: dict[str, list[_Delta]] = {}
    for layer, pair in lora.pairs(lora.splits()).items():
        n, k = pair.B_shape[0], pair.A_shape[1]
        name, delta = f"{layer}.weight", _Delta(pair, slice(0, n))
        want: Shape = (n, k)
        expert = _EXPERT.fullmatch(layer)
        if expert and name not in base.files:
            e, kind = int(expert[2]), expert[3]
            fused = f"{expert[1]}.{'down_proj' if kind == 'down' else 'gate_up_proj'}"
            experts = base.specs[fused].shape[0] if fused in base.files else 0
            if e < experts:
                first = n if kind == "up" else 0
                name, delta = fused, _Delta(pair, slice(first, first + n), e)
                want = (experts, n if kind == "down" else 2 * n, k)
        if name not in base.files:
            raise UserError(
                f"{lora.path}: adapts {layer!r}, which {base.folder} does not have; is it an adapter of another model?"
            )
        shape = base.specs[name].shape
        if shape != want:
            raise UserError(
                f"{lora.path}: the adapter of {layer!r} has {n} outputs and {k} inputs, which do not fit "
                f"{name!r} {list(shape)} of {base.folder}; is it an adapter of another model?"
            )
        deltas.setdefault(name, []).append(delta)
    return deltas


def _output_spec(base: Checkpoint, name: str, adapted: bool, dtype: MergeDtype) -> TensorSpec:
    spec = base.specs[name]
    stored = torch.bfloat16 if base.is_fp8(name) else spec.dtype
    real = stored in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if adapted and not real:
        raise UserError(
            f"{base.files[name]}: tensor {name!r} is quantized ({stored}); merge into the bf16 model it was quantized "
            "from"
        )
    return TensorSpec(DTYPES[dtype] if real and dtype != "keep" else stored, spec.shape)


def _merged(
    base: Checkpoint,
    name: str,
    deltas: list[_Delta],
    lora: AdapterFile,
    dtype: torch.dtype,
    onto: QuantSettings | None,
    trained_in: torch.dtype,
) -> Iterator[tuple[tuple, Tensor]]:
    """Yield the pieces of an output tensor, each with its index."""
    shape = base.specs[name].shape
    if not shape:
        yield (), base.read(name, ()).to(dtype)
        return
    for e in range(shape[0]) if len(shape) == 3 else [None]:
        index = full_index(*shape) if e is None else (slice(e, e + 1), *full_index(*shape[1:]))
        matrix = base.read(name, index, torch.bfloat16 if onto else torch.float32)
        matrix = quantize_dequantize(name, matrix, onto, trained_in) if onto else matrix
        of_matrix = [delta for delta in deltas if delta.e == e]
        for rows in _row_pieces(matrix):
            piece = matrix[rows]
            if onto and piece.is_floating_point():
                piece = piece.to(trained_in)  # a run loads unquantized tensors in this precision
            yield (rows,) if e is None else (e, rows), _add(piece, of_matrix, lora, rows).to(dtype)


def _row_pieces(weight: Tensor) -> Iterator[slice]:
    row = 4 * max(1, math.prod(weight.shape[1:]))
    length = max(1, PIECE_BYTES // row)
    for start in range(0, weight.shape[0], length):
        yield slice(start, min(start + length, weight.shape[0]))


def _add(weight: Tensor, deltas: list[_Delta], lora: AdapterFile, rows: slice) -> Tensor:
    """Add the adapters to `rows` of a matrix. The sum is in fp32; without an adapter, `weight` is returned as it is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = None
    for delta in deltas:
        first, last = max(rows.start, delta.rows.start), min(rows.stop, delta.rows.stop)
        if first < last:
            total = weight.to(wide, copy=True) if total is None else total
            A = lora.tensor(delta.pair.A).to(wide)
            B = lora.tensor(delta.pair.B)[first - delta.rows.start : last - delta.rows.start].to(wide)
            total[first - rows.start : last - rows.start].addmm_(B, A, alpha=delta.pair.scaling)
    return weight if total is None else total


def _shards(specs: dict[str, TensorSpec], limit: int) -> dict[str, list[str]]:
    """The tensors of each output file, with transformers' file names."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += spec.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, 1)}


def _companions(folder: Path) -> list[Path]:
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def _check_room(out: Path, needed: int) -> None:
    disk = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"{out}: needs {size(needed)}, {size(needed - free)} more than its disk has free; free space or choose "
            "another disk"
        )


def _write_companions(source: Path, files: list[Path], out: Path, config: dict[str, Any]) -> None:
    for path in files:
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if config != read_json(source):
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merged_config(base: Checkpoint, dtype: MergeDtype) -> dict[str, Any]:
    """config.json with which every tool reads the merged weights as they are."""
    config = read_json(base.folder)
    if dtype != "keep":
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:  # transformers 4 wrote torch_dtype
            config[key] = str(DTYPES[dtype]).removeprefix("torch.")
    if config.get("tie_word_embeddings") and not base.are_equal(EMBEDDING, HEAD):
        config["tie_word_embeddings"] = False
    if any(map(base.is_fp8, base.specs)):
        config = {key: value for key, value in config.items() if key not in fp8.KEYS}
    return config


def _write_index(shards: dict[str, list[str]], specs: dict[str, TensorSpec], out: Path) -> None:
    if len(shards) == 1:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
