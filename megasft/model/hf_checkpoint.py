"""Read a Hugging Face checkpoint. Each rank reads only the slices it keeps.

Experts may have either layout: one tensor per expert and projection, as in hub checkpoints, or all experts in one
tensor (`experts.gate_up_proj` [E, 2F, H], `experts.down_proj` [E, H, F]), as transformers 5 holds them in memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import Qwen3MoeConfig

from megasft.messages import UserError
from megasft.model.hf_config import read_config, sparse_layers
from megasft.storage.safetensors import TensorFile
from megasft.storage.shards import Index, Shard

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
    """The safetensors files of a model folder, with the names and shapes of all tensors. Data is read on demand.

    Raises UserError for missing, corrupted or pickled weights, and for an index that does not match the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, TensorFile] = {}
        self.files = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self.files.values())):
            for name, spec in self._file(path).specs.items():
                self.shapes[name] = spec.shape
                self.files.setdefault(name, path)
        for name, path in self.files.items():
            if name not in self.shapes:
                raise UserError(
                    f"{self.folder}: the index lists tensor {name!r} in {path.name}, but the file does not contain it"
                )

    def _files(self) -> dict[str, Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
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
        if single.is_file():
            return dict.fromkeys(self._file(single).specs, single)
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
            if name in self.shapes:
                found = self.shapes[name]
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
        raise UserError(f"{self.folder}: the checkpoint has no tensor {shard.name!r}, which config.json requires")

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, as a view of the file. Only the slice's bytes are read, on first use."""
        piece = self._file(self.files[name]).tensor(name)[index]
        return piece[0] if len(index) == 3 else piece

    def release(self) -> None:
        """Free the memory of the data read so far."""
        for file in self._open.values():
            file.release()

    def refuse_surplus(self, config: Qwen3MoeConfig) -> None:
        """Raise UserError for a tensor that is not part of the architecture in config.json."""
        known = set(expected_names(config))
        surplus = sorted(name for name in self.shapes if name not in known)
        if surplus:
            raise UserError(
                f"{self.files[surplus[0]]}: {len(surplus)} tensor(s) are not part of the model that config.json "
                f"describes, such as {surplus[0]!r}"
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
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
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
