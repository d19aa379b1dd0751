"""Parameters of a model and of its adapters, by kind of module."""

from megasft.config.values import ROUTER
from megasft.model.shape import Shape, head_dim, sparse_layers


def parameters(shape: Shape) -> dict[str, int]:
    """All parameters of the base."""
    h, sparse = shape.hidden_size, sum(sparse_layers(shape))
    dense = shape.num_hidden_layers - sparse
    found = {
        "embedding": shape.vocab_size * h,
        "attention": shape.num_hidden_layers * sum(inputs * outputs for _, inputs, outputs in _attention(shape)),
        "router": sparse * shape.num_experts * h,
        "experts": sparse * shape.num_experts * 3 * h * shape.moe_intermediate_size,
        "dense feed-forward": dense * 3 * h * shape.intermediate_size,
        "norms": shape.num_hidden_layers * 2 * (h + head_dim(shape)) + h,
        "head": 0 if shape.tie_word_embeddings else shape.vocab_size * h,
    }
    return {kind: number for kind, number in found.items() if number}


def trained(shape: Shape, targets: frozenset[str], r: int) -> dict[str, int]:
    """The parameters of LoRA of rank `r` on the layers `targets`: r x (inputs + outputs) of each matrix."""
    h, sparse = shape.hidden_size, sum(sparse_layers(shape))
    dense = shape.num_hidden_layers - sparse
    projections = len(targets & {"gate_proj", "up_proj", "down_proj"})
    attention = sum(inputs + outputs for name, inputs, outputs in _attention(shape) if name in targets)
    found = {
        "attention": shape.num_hidden_layers * r * attention,
        "router": sparse * r * (h + shape.num_experts) * (ROUTER in targets),
        "experts": sparse * shape.num_experts * r * projections * (h + shape.moe_intermediate_size),
        "dense feed-forward": dense * r * projections * (h + shape.intermediate_size),
    }
    return {kind: number for kind, number in found.items() if number}


def _attention(shape: Shape) -> list[tuple[str, int, int]]:
    h, d = shape.hidden_size, head_dim(shape)
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    return [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
