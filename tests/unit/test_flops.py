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
