"""How peft stores LoRA of Qwen3-MoE in files: tensor names, shapes and the content of `adapter_config.json`.

megasft names an adapter tensor after its linear layer in a hub checkpoint, with one tensor per expert:
`model.layers.0.mlp.experts.7.up_proj.lora_A.weight` [r, K], `...lora_B.weight` [N, r]. Files store the experts in one
of two layouts; a `Layout` maps each tensor to its place in the file:

    per-expert   one tensor per expert, as above: what vLLM reads for Qwen3-MoE; peft 0.21 fuses it on loading
    fused        all experts of a layer in one tensor: what peft trains and saves on transformers 5
                   experts.base_layer.lora_A   gate and up, [E * R, H]: the R rows of expert 0, of expert 1, ...
                   experts.base_layer.lora_B   [2 F, R * E]: column c of all experts, column c + 1 of all experts, ...
                   experts.lora_A, experts.lora_B   down, the same way, [E * r, F] and [H, r * E]

If down is not adapted, `experts.lora_*` is the only wrapper and holds gate and up. Separate adapters of gate and up
become one of rank R = 2 r: A stacked, B block-diagonal, with the same scaling because alpha doubles too. peft does not
keep B block-diagonal: further training fills the zero blocks, and gate and up then share all R rows of A.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megasft.storage.shards import leaf

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
# What servers do with an adapter that holds LoRA of routers: docs/adapters.md, tests/serving.
SERVED_ROUTER = "vLLM 0.32 serves it without the router's part and says nothing, SGLang 0.5.23 refuses it"
LayoutName = Literal["per-expert", "fused"]
Shape = tuple[int, ...]

_EXPERT = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<e>\d+)\.(?P<kind>gate|up|down)_proj\.lora_(?P<matrix>[AB])\.weight"
)


@dataclass(frozen=True)
class Place:
    """Where an adapter tensor is in a file: view the file's tensor `name` [*shape] as [*split] and take `index`."""

    name: str
    shape: Shape
    split: Shape
    index: tuple[int | slice, ...] = ()

    def within(self, tensor: Tensor) -> Tensor:
        """The adapter tensor, as a view of the file's tensor."""
        return tensor.view(self.split)[self.index]


@dataclass(frozen=True)
class Layout:
    """One of the two layouts.

    Args:
        experts: number of experts E in the fused layout; 0 for the per-expert layout.
        shared: whether gate and up share all rows of A, instead of half each.
        nested: whether both wrappers exist: `experts.base_layer` around gate and up, `experts` around down.
    """

    experts: int = 0
    shared: bool = False
    nested: bool = True

    def place(self, name: str, shape: Shape) -> Place:
        """The place of the adapter tensor `name`, [r, K] or [N, r]."""
        expert = _EXPERT.fullmatch(name) if self.experts else None
        if expert is None:
            return Place(PREFIX + name, shape, shape)
        e, kind, matrix, size = int(expert["e"]), expert["kind"], expert["matrix"], self.experts
        inner = ".base_layer" if kind != "down" and self.nested else ""
        fused = f"{PREFIX}{expert['experts']}{inner}.lora_{matrix}.weight"
        up, all_ = int(kind == "up"), slice(None)
        if matrix == "A":
            r, k = shape
            if kind == "down" or self.shared:
                return Place(fused, (size * r, k), (size, r, k), (e,))
            return Place(fused, (size * 2 * r, k), (size, 2, r, k), (e, up))
        n, r = shape
        if kind == "down":
            return Place(fused, (n, r * size), (n, r, size), (all_, all_, e))
        if self.shared:
            return Place(fused, (2 * n, r * size), (2, n, r, size), (up, all_, all_, e))
        return Place(fused, (2 * n, 2 * r * size), (2, n, 2, r, size), (up, all_, up, all_, e))


def layout_for(name: LayoutName, shapes: Mapping[str, Shape]) -> Layout:
    """The layout in which to write these tensors."""
    experts = {int(match["e"]) for match in map(_EXPERT.fullmatch, shapes) if match}
    return Layout(experts=max(experts) + 1) if name == "fused" and experts else Layout()


def stem(tensor: str) -> str:
    """The name of the linear layer that an adapter tensor belongs to."""
    return tensor.rpartition(".lora_")[0]


def with_zeros(shapes: Mapping[str, Shape], experts: int = 0) -> dict[str, Shape]:
    """`shapes`, plus the untrained ones of gate, up and down that must be written as zeros.

    peft fuses gate and up and wraps down around them, and vLLM packs all three. If one of the three is a target and the
    file lacks the others, both refuse the file or, worse, do not apply it. peft also needs all `experts` of a layer in
    which one is adapted.
    """
    complete = dict(shapes)
    for name, shape in shapes.items():
        layer = stem(name)
        kind, path = leaf(layer), layer.rpartition(".")[0]
        if kind not in MLP_TARGETS or not name.endswith(".lora_A.weight"):
            continue
        r, k = shape
        n = shapes[f"{layer}.lora_B.weight"][0]
        hidden, inner = (n, k) if kind == "down_proj" else (k, n)
        for other in MLP_TARGETS:
            n, k = (hidden, inner) if other == "down_proj" else (inner, hidden)
            complete.setdefault(f"{path}.{other}.lora_A.weight", (r, k))
            complete.setdefault(f"{path}.{other}.lora_B.weight", (n, r))
    of_experts = {}
    for name, shape in complete.items():
        if expert := _EXPERT.fullmatch(name):
            of_experts[expert["experts"], f"{expert['kind']}_proj.lora_{expert['matrix']}.weight"] = shape
    for (path, rest), shape in of_experts.items():
        for e in range(experts):
            complete.setdefault(f"{path}.{e}.{rest}", shape)
    return complete


def peft_config(
    shapes: Mapping[str, Shape], r: int, alpha: float, layout: LayoutName, base_model: str
) -> dict[str, Any]:
    """The `adapter_config.json` with which peft 0.21 and vLLM apply every one of these tensors."""
    layers = {stem(name) for name in shapes}
    names = {leaf(layer) for layer in layers}
    sparse = any(".mlp.experts." in layer for layer in layers)
    # peft reads gate_proj, up_proj and down_proj as expert parameters; dense layers must list theirs as parameters.
    dense = any(leaf(layer) in MLP_TARGETS and ".mlp.experts." not in layer for layer in layers)
    parameters = {f"mlp.{name}.weight" for name in MLP_TARGETS} if dense else set()
    patterns: dict[str, Any] = {}
    alpha = int(alpha) if alpha == int(alpha) else alpha
    if layout == "fused":
        if "gate" in names:
            parameters.add("mlp.gate.weight")
        if sparse:
            parameters |= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
            patterns["rank_pattern"] = {"mlp.experts.gate_up_proj": 2 * r}
            patterns["alpha_pattern"] = {"mlp.experts.gate_up_proj": 2 * alpha}
        names -= {"gate", *MLP_TARGETS}
    return _DEFAULTS | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,  # peft refuses other values for experts; only training uses dropout
        "target_modules": sorted(names),
        "target_parameters": sorted(parameters) or None,
        **patterns,
    }


# What peft 0.21.2 writes for `LoraConfig()`; a test compares the two. Importing peft instead would cost rank 0 about
# ten seconds in the middle of training, because peft imports bitsandbytes where it is installed.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": False,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": None, "target_parameters": None, "task_type": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip
