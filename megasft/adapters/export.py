"""Convert an adapter folder to the other layout, tensor by tensor, without a model or ranks."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from megasft.adapters.adapter_file import AdapterFile, AdapterWriter, common_scaling
from megasft.adapters.peft_layout import LayoutName
from megasft.messages import UserError, warn
from megasft.model.hf_config import read_json
from megasft.model.hub import local_folder

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    layout: LayoutName = "per-expert",
    base_model: str = "",
    without_router: bool = False,
) -> int:
    """Write the adapter in the folder `adapter` to the folder `out` in `layout`, which may be the layout it has.

    Returns the number of routers whose LoRA is written or, `without_router`, left out. Updates of weights do not
    change. If layers differ in rank, all are padded with zeros to the largest rank, because vLLM and peft's own
    conversion need one rank for all layers; if they differ in alpha / r, their B is multiplied, in fp32, so that one
    alpha / r gives the same updates. Experts without an adapter get one of zeros, because peft needs them all. peft
    loads the base from `base_model`, by default the name in `adapter`. `out` appears complete or not at all. Raises
    UserError for a corrupted adapter, one with more experts than its base, an `out` that holds files, and an adapter of
    the router alone if that is to be left out.
    """
    source = AdapterFile(adapter)
    source.require_finite()
    pairs, routers = source.pairs(source.splits()), source.routers()
    if without_router:
        pairs = {layer: pair for layer, pair in pairs.items() if layer not in routers}
        if not pairs:
            raise UserError(f"{source.path}: adapts only the router; without it nothing is left to export")
    r = max(pair.r for pair in pairs.values())
    scaling = common_scaling(pairs)
    others = {layer: pair.scaling / scaling for layer, pair in pairs.items()}
    factors = {layer: factor for layer, factor in others.items() if not math.isclose(factor, 1)}
    dtype = torch.promote_types(source.dtype, torch.float32) if factors else source.dtype
    shapes = {}
    for layer, pair in pairs.items():
        shapes[f"{layer}.lora_A.weight"] = (r, pair.A_shape[1])
        shapes[f"{layer}.lora_B.weight"] = (pair.B_shape[0], r)
    name = base_model or str(source.config.get("base_model_name_or_path") or "")
    experts = _experts(source, pairs, name)
    writer = AdapterWriter(out, shapes, dtype, r, scaling * r, layout, name, replace=False, experts=experts)
    try:
        for layer, pair in pairs.items():
            writer.put(f"{layer}.lora_A.weight", slice(0, pair.r), source.tensor(pair.A))
            B = source.tensor(pair.B)
            B = B.float() * factors[layer] if layer in factors else B
            writer.put(f"{layer}.lora_B.weight", (slice(None), slice(0, pair.r)), B)
    except BaseException:
        writer.discard()
        raise
    writer.finish()
    return len(routers)


def _experts(source: AdapterFile, layers: Iterable[str], base: str) -> int:
    """The experts of a layer of the base model, or, if the model is not on this machine, of the adapter."""
    adapted = max((int(match[1]) + 1 for match in map(_EXPERT.search, layers) if match), default=0)
    if not adapted:
        return 0
    folder = local_folder(base)
    config = read_json(folder) if folder else {}
    experts = config.get("num_local_experts", config.get("num_experts"))  # the first as transformers 5 saves it
    if not isinstance(experts, int):
        warn(
            f"{source.folder}: its base model {base or '(none is named)'!r} is not on this machine; if its layers have "
            f"more than the {adapted} experts of the adapter, name the base with --model"
        )
        return adapted
    if adapted > experts:
        raise UserError(
            f"{source.path}: adapts {adapted} experts of a layer, but those of {base} have {experts}; is it an adapter "
            "of another model?"
        )
    return experts
