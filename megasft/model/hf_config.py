"""Read Qwen3-MoE's `config.json`, and check that we can train the model and shard it over a topology."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from megasft.config.parallelism import TopologySizes
from megasft.config.schema import QuantSettings
from megasft.config.values import BLOCK_SIZES
from megasft.messages import UserError
from megasft.model import fp8

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


def stage_layers(layers: int, stages: int) -> list[int]:
    """The number of layers of each pipeline stage. Where they are not all alike, those between the first, which has the
    embedding, and the last, which has the head and the loss, have more. megatron-core wants these alike.
    """
    if stages == 1:
        return [layers]
    middle = -(-layers // stages)
    if layers - middle * (stages - 2) < 2:
        middle = layers // stages
    outer = layers - middle * (stages - 2)
    return [outer - outer // 2, *[middle] * (stages - 2), outer // 2]


def check_fits(config: Qwen3MoeConfig, sizes: TopologySizes, quant: QuantSettings | None = None) -> None:
    """Raise UserError, naming the size that does not fit, if the topology cannot shard the model; with `quant`, also if
    a shard would cut a quantization block.
    """
    if sizes.pipeline > config.num_hidden_layers:
        raise UserError(
            f"[data.topology] pipeline_parallel = {sizes.pipeline} is more than the model's num_hidden_layers = "
            f"{config.num_hidden_layers}; every stage needs a layer"
        )
    dense = any(not sparse for sparse in sparse_layers(config))
    for key, n, name, by in (
        ("num_attention_heads", config.num_attention_heads, "tensor_parallel", sizes.tensor),
        ("num_key_value_heads", config.num_key_value_heads, "tensor_parallel", sizes.tensor),
        ("intermediate_size", config.intermediate_size if dense else 0, "tensor_parallel", sizes.tensor),
        ("num_experts", config.num_experts, "expert_parallel", sizes.expert),
        ("moe_intermediate_size", config.moe_intermediate_size, "expert_tensor_parallel", sizes.expert_tensor),
    ):
        if n % by:
            fitting = ", ".join(str(d) for d in range(1, by) if n % d == 0)
            raise UserError(
                f"[data.topology] {name} = {by} does not divide the model's {key} = {n}; "
                f"smaller sizes that divide it: {fitting}"
            )
    if quant:
        _check_blocks(config, sizes, quant.block_size)


def _check_blocks(config: Qwen3MoeConfig, sizes: TopologySizes, size: int) -> None:
    """Raise UserError unless `size` divides the inputs of every linear layer on a rank."""
    sparse = sparse_layers(config)
    for layers, key, n, name, by in (
        ("q_proj, k_proj, v_proj, gate_proj and up_proj", "hidden_size", config.hidden_size, "", 1),
        ("o_proj", "num_attention_heads x head_dim", config.num_attention_heads * head_dim(config),
         "tensor_parallel", sizes.tensor),
        ("dense down_proj", "intermediate_size", 0 if all(sparse) else config.intermediate_size,
         "tensor_parallel", sizes.tensor),
        ("experts' down_proj", "moe_intermediate_size", config.moe_intermediate_size if any(sparse) else 0,
         "expert_tensor_parallel", sizes.expert_tensor),
    ):  # fmt: skip
        if n // by % size:
            cut = f" / {name} {by}" if by > 1 else ""
            fitting = [d for d in range(1, by) if by % d == 0 and n // d % size == 0]
            blocks = [b for b in BLOCK_SIZES if n // by % b == 0]
            remedies = [f"block_size = {blocks[-1]}"] if blocks and blocks[-1] < size else []
            remedies += [f"[data.topology] {name} = {fitting[-1]}"] if fitting else []
            remedies += ["[training] use_qlora = false"] if not remedies else []
            raise UserError(
                f"[quant] block_size = {size} does not divide the {n // by} inputs that a rank holds of {layers} "
                f"({key} {n}{cut}); set {' or '.join(remedies)}"
            )


def head_dim(config: Qwen3MoeConfig) -> int:
    """Width of an attention head. config.json may omit `head_dim`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def weights(config: Qwen3MoeConfig) -> int:
    """The number of weights in the matrices of the model: embedding, head, attention and feed-forward layers."""
    h, d = config.hidden_size, head_dim(config)
    attention = 2 * h * d * (config.num_attention_heads + config.num_key_value_heads)
    experts = h * config.num_experts * (3 * config.moe_intermediate_size + 1)
    feed_forward = sum(experts if sparse else 3 * h * config.intermediate_size for sparse in sparse_layers(config))
    vocabulary = config.vocab_size * h * (1 if config.tie_word_embeddings else 2)
    return vocabulary + config.num_hidden_layers * attention + feed_forward


def sparse_layers(config: Qwen3MoeConfig) -> list[bool]:
    """For each layer, whether it has experts; if not, it is dense."""
    return [
        i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]
