"""Check an adapter's files against a model's config.json and the [lora] settings.

The check needs no model and no ranks, so a wrong adapter is refused before the launch.
"""

import json
import math
from collections.abc import Iterator, Mapping

from transformers import Qwen3MoeConfig

from megasft.adapters.adapter_file import AdapterFile, Pair, common_scaling
from megasft.adapters.peft_layout import CONFIG, MLP_TARGETS
from megasft.config.schema import LoraSettings
from megasft.config.values import short_targets
from megasft.messages import UserError, warn
from megasft.model.hf_checkpoint import fingerprint
from megasft.model.hub import base_name, local_folder
from megasft.model.shape import head_dim, sparse_layers
from megasft.storage.shards import leaf


def fitting_pairs(adapter: AdapterFile, lora: LoraSettings, hf_config: Qwen3MoeConfig) -> dict[str, Pair]:
    """The adapter of every linear layer that `lora` adapts in a model, by the layer's name.

    Reads the file's header, and values only to find layers that are adapted but not named in `lora`. Raises UserError
    for a different r, alpha, set of targets or shape, and for a missing or surplus layer.
    """
    split = lora.r == adapter.config["r"] or adapter.splits()
    pairs = adapter.pairs(split)
    _check_scaling(adapter, pairs, lora)
    _check_layers(adapter, pairs, lora.targets, dict(_linear_shapes(hf_config)))
    return pairs


def warn_of_other_base(adapter: AdapterFile, model: str) -> None:
    """Say so if the adapter names another base model than `model`.

    Two models on this machine are compared by their weights. Of others only the last part of the name counts, which a
    folder keeps when it is moved.
    """
    named = str(adapter.config.get("base_model_name_or_path") or model)
    ours, theirs = local_folder(model), local_folder(named)
    if ours and theirs:
        try:
            same = ours.samefile(theirs) or fingerprint(ours) == fingerprint(theirs)
        except UserError:
            same = False
    else:
        same = base_name(named) == base_name(model)
    if not same:
        warn(
            f"{adapter.folder / CONFIG}: names the base model {named!r}, and is used with {model!r}; if that is not a "
            "copy of the same model, the adapter was trained for other weights"
        )


def _check_scaling(adapter: AdapterFile, pairs: Mapping[str, Pair], lora: LoraSettings) -> None:
    """Raise UserError unless [lora] r is the adapter's largest r, and [lora] alpha / r the scaling of most layers."""
    config = adapter.config
    widest = max(pairs, key=lambda layer: pairs[layer].r)
    r = pairs[widest].r
    if r != lora.r:
        own = "" if r == config["r"] else f"{leaf(widest)} has rank {r}: "
        shared = "gate and up share it; " if own and leaf(widest) in ("gate_proj", "up_proj") else ""
        alpha = common_scaling(pairs) * r
        raise UserError(
            f"{adapter.folder / CONFIG}: {own}r = {r}, but [lora] r = {lora.r}; {shared}"
            f"set [lora] r = {r} and alpha = {alpha:g} to continue from this adapter"
        )
    scaling = common_scaling(pairs)
    if not math.isclose(scaling, lora.alpha / lora.r):
        layer = next(layer for layer in pairs if pairs[layer].scaling == scaling)
        raise UserError(
            f"{adapter.folder / CONFIG}: lora_alpha = {config['lora_alpha']:g} scales {leaf(layer)} by "
            f"{scaling:g}, but [lora] alpha = {lora.alpha:g} by {lora.alpha / lora.r:g}; "
            f"set [lora] alpha = {scaling * r:g} to continue from this adapter"
        )


def _check_layers(
    adapter: AdapterFile, pairs: Mapping[str, Pair], targets: frozenset[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Raise UserError unless the adapter has exactly the targets, and the layers and shapes of the model."""
    path, adapted = adapter.path, adapter.adapted(pairs, targets)
    if adapted != targets:
        names, asked = (", ".join(short_targets(layers)) for layers in (adapted, targets))
        ours = json.dumps(short_targets(adapted))
        remedy = f"set [lora] target_modules = {ours} to continue from it" if adapted else "name another adapter"
        raise UserError(
            f"{path}: adapts {names or 'no layer (B is zero)'}, but [lora] target_modules asks for {asked}; {remedy}"
        )
    foreign = next((layer for layer in pairs if layer not in shapes), None)
    if foreign:
        raise UserError(
            f"{path}: adapts {foreign!r}, which this model does not have; is it an adapter of another model?"
        )
    missing = next((layer for layer in sorted(shapes) if leaf(layer) in targets and layer not in pairs), None)
    if missing:
        raise UserError(
            f"{path}: has no adapter for {missing!r}; is it an adapter of another model, or of only some layers?"
        )
    for layer, pair in pairs.items():
        n, k = shapes[layer]
        for size, want, what in ((pair.A_shape[1], k, "inputs"), (pair.B_shape[0], n, "outputs")):
            if size != want:
                raise UserError(
                    f"{path}: the adapter of {layer!r} has {size} {what}, but this model's layer has {want}; is it an "
                    "adapter of another model?"
                )


def _linear_shapes(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (outputs, inputs)) of all linear layers that LoRA can adapt, with one entry per expert."""
    hidden, d = config.hidden_size, head_dim(config)
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    for i, sparse in enumerate(sparse_layers(config)):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj", (queries, hidden)
        yield f"{layer}.self_attn.k_proj", (keys, hidden)
        yield f"{layer}.self_attn.v_proj", (keys, hidden)
        yield f"{layer}.self_attn.o_proj", (hidden, queries)
        if sparse:
            yield f"{layer}.mlp.gate", (config.num_experts, hidden)
        inner = config.moe_intermediate_size if sparse else config.intermediate_size
        for path in [f"experts.{e}." for e in range(config.num_experts)] if sparse else [""]:
            for name in MLP_TARGETS:
                yield f"{layer}.mlp.{path}{name}", (hidden, inner) if name == "down_proj" else (inner, hidden)
