"""Floating-point operations of a training step, from the sizes of the model and the tokens of the step.

A multiplication plus an addition counts as two. Frozen weights: 2 per active weight and token in forward, 2 in backward
for the gradient of the input. LoRA: 2 in forward, 4 in backward. Attention: two products of half a square (causal) per
conversation in forward, four in backward. Head: as frozen weights, for supervised positions only. Not counted: norms,
softmax, activations, dequantization and the optimizer, and the saving that the first layer's input, an embedding, needs
no gradient. A layer that is computed again leaves out its last product, of `down` (`lora.recompute`), but for
experts on other ranks, where this counts too little.
"""

from collections.abc import Set
from dataclasses import dataclass

from megasft.config.values import ROUTER, Recompute
from megasft.model.shape import Shape, head_dim, sparse_layers


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step, over all ranks."""

    frozen: float
    lora: float
    attention: float
    head: float
    recomputed: float  # the second forward of the layers; not part of `model`

    @property
    def model(self) -> float:
        """FLOPs that the model needs, without recomputation."""
        return self.frozen + self.lora + self.attention + self.head


def step_flops(
    config: Shape, targets: Set[str], r: int, tokens: int, supervised: int, squares: int, recompute: Recompute
) -> Flops:
    """FLOPs of a step with LoRA of rank `r` on the layers `targets`.

    Args:
        tokens, supervised: fed and supervised tokens of the global batch, without padding.
        squares: sum of the squared lengths of its conversations.
        recompute: whether layers run forward twice; "selective": MLPs only.
    """
    active = active_lora = again = 0
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    h, q = config.hidden_size, config.num_attention_heads * head_dim(config)
    kv = config.num_key_value_heads * head_dim(config)
    for sparse in sparse_layers(config):
        f, times = (
            (config.moe_intermediate_size, config.num_experts_per_tok) if sparse else (config.intermediate_size, 1)
        )
        linears = [("q_proj", 1, h, q), ("k_proj", 1, h, kv), ("v_proj", 1, h, kv), ("o_proj", 1, q, h)]
        linears += [("gate_proj", times, h, f), ("up_proj", times, h, f), ("down_proj", times, f, h)]
        linears += [(ROUTER, 1, h, config.num_experts)] * sparse
        active += sum(n * inputs * outputs for _, n, inputs, outputs in linears)
        active_lora += sum(r * n * (inputs + outputs) for name, n, inputs, outputs in linears if name in targets)
        again += sum(
            n * (inputs * outputs + r * (inputs + outputs) * (name in targets))
            for name, n, inputs, outputs in linears
            if recompute is True or name not in attention
        )
        again -= times * h * (f + r * ("down_proj" in targets))
    scores = squares * config.num_hidden_layers * q / 2  # multiplications of one product
    return Flops(
        frozen=4.0 * tokens * active,
        lora=6.0 * tokens * active_lora,
        attention=6 * 2 * scores,
        head=4.0 * supervised * h * config.vocab_size,
        recomputed=2.0 * tokens * again + 2 * 2 * scores * (recompute is True) if recompute else 0.0,
    )
