"""The FLOPs of a step are those that torch counts in transformers' model, with half of attention's, which is causal."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megasft.model.flops import step_flops
from tests.parity.reference import random_model, tiny_config


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [1]}], ids=["experts", "a dense layer"])
def test_frozen_layers_attention_and_head_are_what_torch_counts(changes):
    config = tiny_config(num_hidden_layers=3, **changes)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # a product for each expert; torch counts no grouped ones
    model = random_model(config).requires_grad_(False)
    tokens = 24
    embedded = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    counts = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    scores = 6 * 2 * tokens**2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert counts["aten.bmm"] == scores
    found = step_flops(config, frozenset(), 16, tokens, tokens, tokens**2, recompute=True)
    assert found.attention == scores / 2
    assert found.frozen + found.head == sum(counts.values()) - counts["aten.bmm"]
    assert found.lora == 0


@pytest.mark.parametrize("dense", [[], [1]], ids=["experts", "a dense layer"])
def test_recomputation_is_a_forward_without_the_product_of_down(dense):
    config, r, tokens = tiny_config(num_hidden_layers=3, mlp_only_layers=dense, intermediate_size=80), 4, 24

    def of(targets):
        return step_flops(config, frozenset(targets), r, tokens, 0, tokens**2, recompute=True)

    k, sparse = config.num_experts_per_tok, 3 - len(dense)
    widths = sparse * k * config.moe_intermediate_size + len(dense) * config.intermediate_size
    frozen, adapted = of([]), of(["q_proj", "down_proj"])
    of_weights = 2 * tokens * config.hidden_size * widths
    assert frozen.recomputed == frozen.frozen / 2 + frozen.attention / 3 - of_weights
    of_B = 2 * tokens * config.hidden_size * r * (sparse * k + len(dense))
    assert adapted.recomputed - frozen.recomputed == adapted.lora / 3 - of_B


def test_selective_recomputation_is_of_routers_and_mlps_alone():
    config, r, tokens = tiny_config(num_hidden_layers=3, mlp_only_layers=[1], intermediate_size=80), 4, 24

    def of(*targets):
        return step_flops(config, frozenset(targets), r, tokens, 0, tokens**2, recompute="selective").recomputed

    h, f, dense, k = config.hidden_size, config.moe_intermediate_size, 80, config.num_experts_per_tok
    assert of() == 2 * tokens * (2 * h * config.num_experts + 2 * k * 2 * h * f + 2 * h * dense)
    assert of("q_proj", "o_proj") == of()
    assert of("up_proj") - of() == 2 * tokens * r * (2 * k * (h + f) + h + dense)


def test_without_recomputation_none_is_counted():
    assert step_flops(tiny_config(), frozenset(), 16, 24, 24, 24**2, recompute=False).recomputed == 0
