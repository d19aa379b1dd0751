"""Read, check and write PEFT adapter folders in either layout, without a model."""

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasft.adapters.peft_layout import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Layout,
    LayoutName,
    Place,
    Shape,
    layout_for,
    peft_config,
    with_zeros,
)
from megasft.config.schema import LoraSettings
from megasft.config.values import ROUTER
from megasft.messages import UserError
from megasft.storage.new_folder import NewFolder
from megasft.storage.safetensors import TensorFile, TensorFileWriter, TensorSpec, all_finite
from megasft.storage.shards import leaf

# Settings of peft that change what the tensors mean, each with the values that leave them plain LoRA.
_PLAIN: dict[str, tuple] = {
    "use_dora": (False, None), "lora_bias": (False, None), "fan_in_fan_out": (False, None), "kasa_config": (None,),
    "modules_to_save": (None, []), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    # The other initializations subtract their initial B A from the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
_TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")
_WRAPPER = re.compile(r"(?P<experts>.+\.mlp\.experts)(?P<inner>\.base_layer)?")


@dataclass(frozen=True)
class Pair:
    """The adapter of one linear layer: delta W [N, K] = scaling * B A, with A [r, K] and B [N, r]."""

    A: Place
    B: Place
    A_shape: Shape
    B_shape: Shape
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.A_shape[0]


@dataclass(frozen=True)
class _Fused:
    """The fused adapter of a layer's experts: down alone, or gate and up together."""

    experts: str
    kinds: tuple[str, ...]
    count: int
    r: int
    scaling: float
    nested: bool


class AdapterFile:
    """A PEFT LoRA adapter, opened for reading. Opening it checks names and shapes and reads no values.

    Raises UserError for a folder that holds no LoRA adapter, is corrupted, contradicts itself or has pickled weights.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / WEIGHTS
        self.config = _read_config(self.folder)
        if not self.path.is_file() and (self.folder / "adapter_model.bin").exists():
            raise UserError(f"{self.folder}/adapter_model.bin: pickled adapters are never read; save it as {WEIGHTS}")
        self.file = TensorFile(self.path)
        self._plain: dict[str, tuple[Shape, Shape]] = {}
        self._fused: list[_Fused] = []
        self._classify_tensors()

    def pairs(self, split: bool) -> dict[str, Pair]:
        """The adapter of every linear layer, by the layer's name in a hub checkpoint, one entry per expert.

        `split` separates a fused gate and up of twice the configured rank into two adapters of half that rank. This is
        exact only if B is block-diagonal. Without `split`, gate and up each take all rows of the shared A.
        """
        pairs = {}
        for layer, (a, b) in self._plain.items():
            pairs[layer] = self._pair(Layout(), layer, a, b, self._scaling(self._alpha(layer), a[0]))
        for fused in self._fused:
            halves = split and self._may_split(fused)
            r = fused.r // 2 if halves else fused.r
            layout = Layout(fused.count, not halves, fused.nested)
            A, B = self._wrapper(fused)
            n = self.file.specs[B].shape[0] // len(fused.kinds)
            k = self.file.specs[A].shape[1]
            for e in range(fused.count):
                for kind in fused.kinds:
                    layer = f"{fused.experts}.{e}.{kind}"
                    pairs[layer] = self._pair(layout, layer, (r, k), (n, r), fused.scaling)
        return pairs

    @property
    def fused(self) -> bool:
        """Whether experts are in the fused layout."""
        return bool(self._fused)

    def routers(self) -> list[str]:
        """The names of the routers for which the file holds LoRA, trained or not."""
        return sorted(layer for layer in self._plain if leaf(layer) == ROUTER)

    def settings(self) -> LoraSettings:
        """The [lora] settings of a model that loads this adapter and needs no other LoRA layers."""
        pairs = self.pairs(self.splits())
        widest = max(pairs.values(), key=lambda pair: pair.r)
        targets = tuple(sorted(self.adapted(pairs)))
        # Skip validation: if every B is zero, there are no targets.
        return LoraSettings.model_construct(
            r=widest.r, alpha=common_scaling(pairs) * widest.r, dropout=0.0, target_modules=targets
        )

    def tensor(self, place: Place) -> Tensor:
        """The adapter tensor at `place`, as a view of the file; bf16 of an FP8 tensor."""
        return _readable(place.within(self.file.tensor(place.name)))

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every value exactly."""
        return reduce(torch.promote_types, (_wider(spec.dtype) for spec in self.file.specs.values()))

    def splits(self) -> bool:
        """Whether B is block-diagonal for every fused gate and up. Reads B until the first nonzero shared block."""
        for fused in filter(self._may_split, self._fused):
            B = _readable(self.file.tensor(self._wrapper(fused)[1]))
            halves = B.view(2, B.shape[0] // 2, 2, fused.r // 2, fused.count)
            if halves[0, :, 1].any() or halves[1, :, 0].any():
                return False
            self.file.release()
        return True

    def require_finite(self) -> None:
        """Raise UserError if any value is not finite. Reads the complete file."""
        for name in self.file.specs:
            if not all_finite(self.file.tensor(name)):
                raise UserError(f"{self.path}: tensor {name!r} holds values that are not finite")
            self.file.release()

    def adapted(self, pairs: Mapping[str, Pair], targets: frozenset[str] = frozenset()) -> set[str]:
        """The projections that the adapter changes (`up_proj`): those with a nonzero B, and those named in `targets`.

        A name in `targets` counts without a look at its B, which saves reading it.
        """
        names = {leaf(layer) for layer in pairs} & targets
        for layer, pair in pairs.items():
            if leaf(layer) not in names and self.tensor(pair.B).any():
                names.add(leaf(layer))
        return names

    def _classify_tensors(self) -> None:
        """Separate plain tensors from fused ones, and check their shapes against the configuration."""
        shapes: dict[str, dict[str, Shape]] = {}
        for name, spec in self.file.specs.items():
            match = _TENSOR.fullmatch(name)
            if match is None or len(spec.shape) != 2 or not spec.dtype.is_floating_point:
                raise UserError(
                    f"{self.path}: tensor {name!r} is not a LoRA matrix; megasft reads plain LoRA adapters only"
                )
            shapes.setdefault(match["layer"], {})[match["matrix"]] = spec.shape
        if not shapes:
            raise UserError(f"{self.path}: contains no tensors")
        for layer, matrices in shapes.items():
            if len(matrices) != 2:
                found = next(iter(matrices))
                other = "B" if found == "A" else "A"
                raise UserError(f"{self.path}: {layer!r} has lora_{found} but no lora_{other}; save the adapter again")
            wrapper = _WRAPPER.fullmatch(layer)
            if wrapper is None:
                self._add_plain(layer, matrices["A"], matrices["B"])
            else:
                nested = f"{wrapper['experts']}.base_layer" in shapes
                self._add_fused(wrapper["experts"], bool(wrapper["inner"]), nested, matrices["A"], matrices["B"])

    def _add_plain(self, layer: str, a: Shape, b: Shape) -> None:
        r = self._rank(layer)
        if a[0] != r or b[1] != r:
            raise UserError(
                f"{self.path}: {layer!r} has A {list(a)} and B {list(b)}, but {CONFIG} sets its rank to {r}"
            )
        self._plain[layer] = (a, b)

    def _add_fused(self, experts: str, inner: bool, nested: bool, a: Shape, b: Shape) -> None:
        gate_up = inner if nested else self._only_gate_up()
        parameter = f"{experts}.{'gate_up_proj' if gate_up else 'down_proj'}"
        r = self._rank(parameter)
        if a[0] != b[1] or a[0] % r or (gate_up and b[0] % 2):
            raise UserError(
                f"{self.path}: {parameter!r} has A {list(a)} and B {list(b)}, which do not match the rank {r} "
                f"that {CONFIG} sets"
            )
        kinds = ("gate_proj", "up_proj") if gate_up else ("down_proj",)
        self._fused.append(_Fused(experts, kinds, a[0] // r, r, self._scaling(self._alpha(parameter), r), nested))

    def _only_gate_up(self) -> bool:
        """Whether a single experts wrapper adapts gate and up, not down. Shapes alone can be ambiguous."""
        named: list[str] = []
        for key in ("target_modules", "target_parameters"):
            value = self.config.get(key) or []
            named += value if isinstance(value, list) else []
        names = {leaf(str(name)) for name in named}
        return "down_proj" not in names and bool(names & {"gate_up_proj", "gate_proj", "up_proj"})

    def _wrapper(self, fused: _Fused) -> tuple[str, str]:
        inner = ".base_layer" if fused.nested and len(fused.kinds) == 2 else ""
        return tuple(f"{PREFIX}{fused.experts}{inner}.lora_{matrix}.weight" for matrix in "AB")  # type: ignore[return-value]

    def _may_split(self, fused: _Fused) -> bool:
        return len(fused.kinds) == 2 and fused.r == 2 * self.config["r"]

    def _pair(self, layout: Layout, layer: str, a: Shape, b: Shape, scaling: float) -> Pair:
        A, B = layout.place(f"{layer}.lora_A.weight", a), layout.place(f"{layer}.lora_B.weight", b)
        return Pair(A, B, a, b, scaling)

    def _rank(self, layer: str) -> int:
        return self._pattern("rank_pattern", layer, self.config["r"])

    def _alpha(self, layer: str) -> float:
        return self._pattern("alpha_pattern", layer, self.config["lora_alpha"])

    def _scaling(self, alpha: float, r: int) -> float:
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _pattern(self, key: str, layer: str, default: Any) -> Any:
        """Match patterns as peft's `get_pattern_key` does. peft wraps the router by its parameter, `gate.weight`."""
        for pattern, value in (self.config.get(key) or {}).items():
            if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in (layer, f"{layer}.weight")):
                return value
        return default


def common_scaling(pairs: Mapping[str, Pair]) -> float:
    """The alpha / r of most layers. Others, by `alpha_pattern`, are those whose B must be multiplied to have it too."""
    return statistics.mode(pair.scaling for pair in pairs.values())


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _readable(tensor: Tensor) -> Tensor:
    """FP8 as bf16, which holds all its values: torch cannot compute with FP8 on the CPU."""
    return tensor.to(_wider(tensor.dtype))


class AdapterWriter:
    """Writes an adapter folder in either layout. Untrained tensors that the format requires are written as zeros.

    Args:
        shapes: the shape of every trained tensor, by its name in megasft (`adapters.peft_layout`).
        r, alpha: the LoRA settings of all layers.
        experts: experts of a layer, if some may have no tensor in `shapes`.
        replace: whether to replace a folder that already holds files.
    """

    def __init__(
        self,
        folder: str | Path,
        shapes: Mapping[str, Shape],
        dtype: torch.dtype,
        r: int,
        alpha: float,
        layout: LayoutName,
        base_model: str,
        replace: bool = True,
        experts: int = 0,
    ) -> None:
        self.dtype = dtype
        complete = with_zeros(shapes, experts)
        self.config = peft_config(complete, r, alpha, layout, base_model)
        order = layout_for(layout, complete)
        self.places = {name: order.place(name, shape) for name, shape in complete.items()}
        specs = {place.name: TensorSpec(dtype, place.shape) for place in self.places.values()}
        self.folder = NewFolder(folder, replace)
        try:
            self.file = TensorFileWriter(self.folder.path / WEIGHTS, {name: specs[name] for name in sorted(specs)})
        except OSError as error:
            self.folder.discard()
            raise UserError(f"{folder}: the adapter cannot be written ({error.strerror or error})") from None

    def put(self, name: str, index: Any, value: Tensor) -> None:
        """Write `value` to `index` of the adapter tensor `name`."""
        place = self.places[name]
        place.within(self.file.tensor(place.name))[index] = value.detach().to("cpu", self.dtype)

    def finish(self) -> None:
        """Flush to disk and rename the folder to its final name, replacing any earlier adapter there."""
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        with self.folder as folder:
            self.file.close()
            (folder.path / CONFIG).write_text(text, encoding="utf-8")

    def discard(self) -> None:
        """Delete the unfinished folder."""
        self.folder.discard()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except FileNotFoundError:
        raise UserError(f"{folder}: not an adapter folder: it has no {CONFIG}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as an adapter configuration ({error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type = {kind!r} is not supported; megasft reads LORA adapters only")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported; megasft reads plain LoRA adapters only")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        good = all(type(r) is int and r > 0 for r in (config.get("r"), *ranks.values()))
        good = good and all(type(a) in (int, float) and a > 0 for a in (config.get("lora_alpha"), *alphas.values()))
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
    except (AttributeError, re.error):
        good = False
    if not good:
        raise UserError(
            f"{path}: r and the ranks in rank_pattern must be positive integers, lora_alpha and the alphas in "
            "alpha_pattern positive numbers, and the patterns valid regular expressions"
        )
    return config
