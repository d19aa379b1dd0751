"""The sizes of a Qwen3-MoE, what can be worked out from them, and whether a topology can shard it.

Imports neither torch nor transformers, so that a plan takes no seconds. A `Shape` is transformers' Qwen3MoeConfig, or
`PlainShape`, read from the same `config.json`.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from megasft.config.parallelism import TopologySizes
from megasft.config.schema import QuantSettings
from megasft.config.values import BLOCK_SIZES
from megasft.messages import UserError


class Shape(Protocol):
    """The sizes of a Qwen3-MoE, under transformers' names."""

    @property
    def vocab_size(self) -> Any: ...
    @property
    def hidden_size(self) -> Any: ...
    @property
    def intermediate_size(self) -> Any: ...
    @property
    def num_hidden_layers(self) -> Any: ...
    @property
    def num_attention_heads(self) -> Any: ...
    @property
    def num_key_value_heads(self) -> Any: ...
    @property
    def num_experts(self) -> Any: ...
    @property
    def num_experts_per_tok(self) -> Any: ...
    @property
    def moe_intermediate_size(self) -> Any: ...
    @property
    def decoder_sparse_step(self) -> Any: ...
    @property
    def mlp_only_layers(self) -> Any: ...
    @property
    def tie_word_embeddings(self) -> Any: ...


@dataclass(frozen=True)
class PlainShape:
    """A `Shape` without transformers, with its defaults; hashable."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    tie_word_embeddings: bool = False
    head_dim: int | None = None

    @classmethod
    def of(cls, shape: Shape) -> "PlainShape":
        """The same sizes."""
        found = {field.name: getattr(shape, field.name, None) for field in fields(cls)}
        return cls(**found | {"mlp_only_layers": tuple(found["mlp_only_layers"] or ())})


# Released models, so that they can be planned where neither the model nor a network is at hand (their config.json).
_30B = PlainShape(num_hidden_layers=48, head_dim=128)
_235B = PlainShape(hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64,
                   moe_intermediate_size=1536, head_dim=128)  # fmt: skip
_480B = PlainShape(hidden_size=6144, intermediate_size=8192, num_hidden_layers=62, num_attention_heads=96,
                   num_key_value_heads=8, num_experts=160, moe_intermediate_size=2560, head_dim=128)  # fmt: skip
RELEASED = {
    "Qwen3-Coder-30B-A3B": _30B,
    "Qwen3-30B-A3B": _30B,
    "Qwen3-235B-A22B": _235B,
    "Qwen3-Coder-480B-A35B": _480B,
}


def read_shape(folder: str | Path) -> PlainShape:
    """The sizes in `folder/config.json`. Raises UserError where it is not that of a Qwen3-MoE."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
        raw["num_experts"] = raw.get("num_experts", raw.get("num_local_experts", PlainShape.num_experts))
        found = {field.name: raw[field.name] for field in fields(PlainShape) if field.name in raw}
        shape = PlainShape(**found | {"mlp_only_layers": tuple(found.get("mlp_only_layers") or ())})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a model configuration ({error})") from None
    if kind != "qwen3_moe":
        raise UserError(f"{path}: model_type = {kind!r} is not supported; megasft trains 'qwen3_moe' models")
    for field in fields(PlainShape):
        value = getattr(shape, field.name)
        if field.type is int and not (type(value) is int and value >= 1):
            raise UserError(f"{path}: {field.name} = {value!r} must be a whole number of at least 1")
    return shape


def released(name: str) -> PlainShape | None:
    """The sizes of a released model, by its hub id or folder name; None for another."""
    words = name.rstrip("/").rpartition("/")[2]
    return next((shape for stem, shape in RELEASED.items() if words == stem or words.startswith(f"{stem}-")), None)


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


def check_fits(config: Shape, sizes: TopologySizes, quant: QuantSettings | None = None) -> None:
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


def _check_blocks(config: Shape, sizes: TopologySizes, size: int) -> None:
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


def head_dim(config: Shape) -> int:
    """Width of an attention head. config.json may omit `head_dim`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def weights(config: Shape) -> int:
    """The number of weights in the matrices of the model: embedding, head, attention and feed-forward layers."""
    h, d = config.hidden_size, head_dim(config)
    attention = 2 * h * d * (config.num_attention_heads + config.num_key_value_heads)
    experts = h * config.num_experts * (3 * config.moe_intermediate_size + 1)
    feed_forward = sum(experts if sparse else 3 * h * config.intermediate_size for sparse in sparse_layers(config))
    vocabulary = config.vocab_size * h * (1 if config.tie_word_embeddings else 2)
    return vocabulary + config.num_hidden_layers * attention + feed_forward


def sparse_layers(config: Shape) -> list[bool]:
    """For each layer, whether it has experts; if not, it is dense."""
    return [
        i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]
