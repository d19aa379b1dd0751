"""Convert an adapter folder to the other layout, tensor by tensor, without a model or ranks."""

import math
from functools import reduce
from pathlib import Path

import torch

from megasft.adapters.adapter_file import AdapterFile, AdapterWriter
from megasft.adapters.peft_layout import CONFIG, LayoutName
from megasft.messages import UserError


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    layout: LayoutName = "per-expert",
    base_model: str = "",
    without_router: bool = False,
) -> int:
    """Write the adapter in the folder `adapter` to the folder `out` in `layout`, which may be the layout it has.

    Returns the number of routers whose LoRA is written or, `without_router`, left out. Values do not change. If layers
    differ in rank, all are padded with zeros to the largest rank, because vLLM and peft's own conversion need one rank
    for all layers. peft loads the base from `base_model`, by default the name in `adapter`. `out` appears complete or
    not at all. Raises UserError for a corrupted adapter, for layers with different alpha / r, for an `out` that holds
    files, and for an adapter of the router alone if that is to be left out.
    """
    source = AdapterFile(adapter)
    source.require_finite()
    pairs, routers = source.pairs(source.splits()), source.routers()
    if without_router:
        pairs = {layer: pair for layer, pair in pairs.items() if layer not in routers}
        if not pairs:
            raise UserError(f"{source.path}: adapts only the router; without it nothing is left to export")
    r = max(pair.r for pair in pairs.values())
    scaling = next(iter(pairs.values())).scaling
    for layer, pair in pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"{source.folder / CONFIG}: alpha / r is {pair.scaling:g} for {layer} but {scaling:g} for other "
                "layers; export needs one alpha / r for all layers"
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
    return len(routers)
