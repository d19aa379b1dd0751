"""Read Qwen3-MoE's `config.json`, and check that we can train the model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from megasft.messages import UserError
from megasft.model import fp8
from megasft.model.shape import head_dim

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# Keys that change what a model computes, with the values of Qwen3-MoE as megasft computes it, and why there are no
# others. transformers ignores some of them in this family; a model that sets them is meant for other code.
SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "the feed-forward layers are SwiGLU"),
    "attention_bias": ((False,), "no released Qwen3-MoE model has it"),
    "use_sliding_window": ((False,), "every token attends to all before it; no released Qwen3-MoE model has a window"),
    "attention_dropout": ((0,), "only adapters have dropout ([lora] dropout); it changes no weight, so set it to 0.0"),
    "shared_expert_intermediate_size": ((0,), "Qwen3-MoE has no shared expert"),
    "n_shared_experts": ((0,), "Qwen3-MoE has no shared expert"),
}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # the others depend on the sequence length


def read_config(folder: str | Path) -> Qwen3MoeConfig:
    """The architecture in `folder/config.json`. Raises UserError unless it is a Qwen3-MoE that megasft can train."""
    path, raw = Path(folder) / "config.json", read_json(folder)
    kind = raw.get("model_type")
    if kind != "qwen3_moe":
        raise UserError(f"{path}: model_type = {kind!r} is not supported; megasft trains 'qwen3_moe' models")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # of both, transformers takes the first
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) not in ROPE_TYPES:
        # Checked before transformers, which would print warnings of its own.
        raise UserError(
            f"{path}: rope_parameters = {rope!r} is not supported; supported types: {', '.join(ROPE_TYPES)}"
        )
    try:
        fp8.block_size(raw)
        if raw.get("per_layer_config"):
            raise UserError("per_layer_config is not supported: all layers are alike but for mlp_only_layers")
        others = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
        if others:
            raise UserError(f"layer_types with {others[0]!r} is not supported: all layers have full attention")
        config = Qwen3MoeConfig.from_dict(raw)
        _check_supported(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # transformers raises many kinds of errors on a malformed configuration
        raise UserError(f"{path}: transformers cannot read it: {' '.join(str(error).split())}") from None
    return config


def read_json(folder: str | Path) -> dict[str, Any]:
    """`folder/config.json` of any model. Raises UserError if it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw.get("model_type")
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model folder: it has no config.json") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a model configuration ({error})") from None
    return raw


def _check_supported(config: Qwen3MoeConfig) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "moe_intermediate_size", "decoder_sparse_step"):  # fmt: skip
        if getattr(config, key) < 1:
            raise UserError(f"{key} = {getattr(config, key)!r} must be at least 1")
    for key, (values, why) in SUPPORTED.items():
        if (value := getattr(config, key, None)) not in (None, *values):
            raise UserError(f"{key} = {value!r} is not supported: {why}")
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise UserError(
            f"num_experts_per_tok = {config.num_experts_per_tok} is not supported; the layers have "
            f"{config.num_experts} experts (num_experts)"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads = {config.num_attention_heads} is not supported; "
            f"num_key_value_heads = {config.num_key_value_heads} must divide it"
        )
    if head_dim(config) % 2 or getattr(config, "head_dim", 2) is None:
        raise UserError(f"head_dim = {config.head_dim!r} is not supported; it must be an even number, or left out")
    _check_rope(dict(config.rope_parameters or {}))
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise UserError("num_experts_per_tok = 1 with norm_topk_prob = true is not supported: all router weights are 1")


def _check_rope(rope: dict[str, Any]) -> None:
    """Raise UserError for positions that depend on the sequence length, rotate a part of a head, or mean nothing."""
    if rope.get("rope_type") not in ROPE_TYPES:
        raise UserError(f"rope_parameters = {rope!r} is not supported; supported types: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        factor = rope["partial_rotary_factor"]
        raise UserError(f"partial_rotary_factor = {factor!r} is not supported: Qwen3 rotates complete heads")
    for key, value in rope.items():
        number = isinstance(value, int | float) and (value > 0 or isinstance(value, bool))
        if not (number or key in ("rope_type", "type") or (value is None and key != "rope_theta")):
            raise UserError(f"rope_parameters: {key} = {value!r} is not supported; it must be a positive number")
