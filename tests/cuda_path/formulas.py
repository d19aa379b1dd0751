"""Bytes of a rank's frozen weights, from the sizes of the model and of the topology alone."""

from transformers import Qwen3MoeConfig

from megasft.config.parallelism import TopologySizes
from megasft.config.schema import QuantSettings
from megasft.model.hf_config import sparse_layers
from megasft.quant.nf4 import bytes_per_weight


def frozen_bytes(config: Qwen3MoeConfig, sizes: TopologySizes, stage: int, quantized: bool) -> tuple[int, int]:
    """(bytes in bf16, bytes in 4 bits) of embedding, head, norms, routers; and attention, dense MLP, experts."""
    t, h, d = sizes.tensor, config.hidden_size, config.head_dim
    everywhere = sparse_layers(config)
    here = len(everywhere) // sizes.pipeline
    layers = everywhere[stage * here : (stage + 1) * here]
    vocabulary = -(-config.vocab_size // t) * h
    kept = vocabulary * (stage == 0) + (vocabulary + h) * (stage == sizes.pipeline - 1)
    linear = 0
    for sparse in layers:
        kept += 2 * h + 2 * d  # norms of the layer, of q and of k
        linear += h * d * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) // t
        if sparse:
            kept += config.num_experts * h
            experts = config.num_experts // sizes.expert
            linear += experts * 3 * h * config.moe_intermediate_size // sizes.expert_tensor
        else:
            linear += 3 * h * config.intermediate_size // t
    if not quantized:
        return 2 * (kept + linear), 0
    return 2 * kept, round(linear * bytes_per_weight(QuantSettings()))
