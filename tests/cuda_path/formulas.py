"""Bytes of a rank's frozen weights, from the sizes of the model and of the topology alone."""

from transformers import Qwen3MoeConfig

from megasft.config.parallelism import TopologySizes
from megasft.config.schema import QuantSettings
from megasft.model.shape import sparse_layers
from megasft.quant.kernels import GROUP


def frozen_bytes(config: Qwen3MoeConfig, sizes: TopologySizes, stage: int, quantized: bool) -> tuple[int, int]:
    """(bytes in bf16, bytes in 4 bits) of embedding, head, norms, routers; and attention, dense MLP, experts."""
    t, h, d = sizes.tensor, config.hidden_size, config.head_dim
    everywhere = sparse_layers(config)
    here = len(everywhere) // sizes.pipeline
    vocabulary = -(-config.vocab_size // t) * h
    kept = vocabulary * (stage == 0) + (vocabulary + h) * (stage == sizes.pipeline - 1)
    linear: list[tuple[int, int, int, int]] = []  # how often, rows here, inputs of the full matrix, inputs here
    for sparse in everywhere[stage * here : (stage + 1) * here]:
        kept += 2 * h + 2 * d + sparse * config.num_experts * h  # norms of the layer, of q and of k; the router
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        linear += [(1, q // t, h, h), (2, kv // t, h, h), (1, h, q, q // t)]
        f, split = (config.moe_intermediate_size, sizes.expert_tensor) if sparse else (config.intermediate_size, t)
        times = config.num_experts // sizes.expert if sparse else 1
        linear += [(2 * times, f // split, h, h), (times, h, f, f // split)]
    if not quantized:
        return 2 * (kept + sum(times * rows * inputs for times, rows, _, inputs in linear)), 0
    return 2 * kept, sum(times * _four_bits(*matrix) for times, *matrix in linear)


def _four_bits(rows: int, inputs: int, here: int) -> int:
    """Codes, 8-bit scales, and in fp32 the groups of the scales of full rows and their mean."""
    size = QuantSettings().block_size
    return rows * here // 2 + rows * here // size + 4 * -(-rows * (inputs // size) // GROUP) + 4
