"""A small model whose linear layers divide into blocks of 64, and its weights quantized by bitsandbytes."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megasft.config.values import LINEAR_LAYERS
from tests.parity.reference import linear_shapes, random_adapter, random_model, tiny_config, write_adapter

R, ALPHA = 4, 12.0
# Inputs of 64 at least, even where they are split over four ranks (down of the experts: over two).
IN_BLOCKS = {"head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 128}


def config_in_blocks(**changes) -> Qwen3MoeConfig:
    """The tiny model, with linear layers that divide into blocks."""
    return tiny_config(**(IN_BLOCKS | changes))


def linears(model: Qwen3MoeForCausalLM) -> dict[str, Tensor]:
    """The quantized matrices by their names in a hub checkpoint, as views of the model's parameters."""
    parameters = dict(model.named_parameters())
    found = {}
    for name in linear_shapes(model.config):
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate":
            continue  # the router
        if ".experts." in name:
            experts, _, e = stem.rpartition(".")
            fused = parameters[f"{experts}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(e)]
            half = len(fused) // 2
            found[f"{name}.weight"] = {"gate_proj": fused[:half], "up_proj": fused[half:], "down_proj": fused}[leaf]
        else:
            found[f"{name}.weight"] = parameters[f"{name}.weight"]
    return found


def quantized_by_bitsandbytes(matrix: Tensor, dtype: torch.dtype, double: bool = True, block_size: int = 64) -> Tensor:
    import bitsandbytes.functional as bnb  # takes seconds

    codes, state = bnb.quantize_4bit(matrix, blocksize=block_size, quant_type="nf4", compress_statistics=double)
    state.dtype = dtype
    return bnb.dequantize_4bit(codes, state)


def make(folder: Path, **changes) -> tuple[dict, Qwen3MoeForCausalLM, dict[str, Tensor]]:
    """(settings of a QLoRA job, its base model, random adapters), with all files in `folder`."""
    config = config_in_blocks(**changes)
    model = random_model(config)
    model.save_pretrained(folder / "base", max_shard_size="1MB")
    adapter = random_adapter(config, R, frozenset(LINEAR_LAYERS))
    write_adapter(adapter, folder / "adapter", R, ALPHA)
    settings = {
        "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder / "run")},
        "training": {"use_qlora": True},
        "quant": {"cache_dir": str(folder / "cache")},
        "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": LINEAR_LAYERS},
        "hyperparameters": {"parallelism": {"bf16": False}},
    }  # fmt: skip
    with torch.no_grad():
        for matrix in linears(model).values():
            matrix.copy_(quantized_by_bitsandbytes(matrix, torch.float32))
    return settings, model, adapter
