"""An adapter folder into the other layout: no model, no ranks, one tensor after the other."""

import math
from functools import reduce
from pathlib import Path

import torch

from megasft.adapters.adapter_file import AdapterFile, AdapterWriter
from megasft.adapters.peft_layout import CONFIG, LayoutName
from megasft.messages import UserError


def export_adapter(
    adapter: str | Path, out: str | Path, layout: LayoutName = "per-expert", base_model: str = ""
) -> None:
    """Write the adapter in folder `adapter` to the folder `out` in another layout, or in the same one.

    Values keep their bits. An adapter whose layers differ in rank takes the largest, the others padded with zeros:
    vLLM and peft's own conversion want one rank for all layers. `base_model` is the name peft will load the base from,
    by default that of `adapter`. `out` appears whole or not at all. Raises UserError for a damaged adapter, for layers
    that are scaled differently, and for an `out` that holds files.
    """
    source = AdapterFile(adapter)
    source.require_finite()
    pairs = source.pairs(source.splits())
    r = max(pair.r for pair in pairs.values())
    scaling = next(iter(pairs.values())).scaling
    for layer, pair in pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"{source.folder / CONFIG}: layers are scaled by {scaling:g} and by {pair.scaling:g} ({layer}); "
                "only adapters with one alpha / r can be exported"
            )
    shapes = {}
    for layer, pair in pairs.items():
        shapes[f"{layer}.lora_A.weight"] = (r, pair.A_shape[1])
        shapes[f"{layer}.lora_B.weight"] = (pair.B_shape[0], r)
    dtype = reduce(torch.promote_types, (spec.dtype for spec in source.file.specs.values()))
    name = base_model or str(source.config.get("base_model_name_or_path") or "")
    writer = AdapterWriter(out, shapes, dtype, r, scaling * r, layout, name, replace=False)
    try:
        for layer, pair in pairs.items():
            writer.put(f"{layer}.lora_A.weight", slice(0, pair.r), source.tensor(pair.A))
            writer.put(f"{layer}.lora_B.weight", (slice(None), slice(0, pair.r)), source.tensor(pair.B))
    except BaseException:
        writer.discard()
        raise
    writer.finish()
