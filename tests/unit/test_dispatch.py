"""Copies of tokens: made, weighed and summed as by indexing, forward and backward."""

import pytest
import torch

from megasft.model.dispatch import Copies

TOKENS, EXPERTS, HIDDEN = 7, 5, 6


def chosen(per_token):
    """bool [T, E] with so many experts for each token."""
    order = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order < torch.tensor(per_token)[:, None]


@pytest.mark.parametrize("per_token", [[2] * TOKENS, [0, 3, 1, 0, 5, 2, 0], [0] * TOKENS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_are_sorted_by_expert_and_sums_are_those_of_a_loop(per_token, dtype):
    mask, rounding = chosen(per_token), 0.0 if dtype == torch.float32 else 2.0**-8
    copies = Copies.of(mask, sum(per_token))
    pairs = [(e, t) for e in range(EXPERTS) for t in range(TOKENS) if mask[t, e]]
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weights = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    made, picked = copies.make(x), copies.pick(weights)
    assert made.shape == (len(pairs), HIDDEN)
    assert all(torch.equal(made[i], x[t]) and picked[i] == weights[t, e] for i, (e, t) in enumerate(pairs))

    y = torch.randn(len(pairs), HIDDEN, dtype=dtype, requires_grad=True)
    total = copies.add_up(y)
    expected = torch.zeros(TOKENS, HIDDEN)
    for i, (_, t) in enumerate(pairs):
        expected[t] += y[i].float()
    # Summed in fp32 in the order of the experts and rounded once: by 2^-8 at most, as bf16 has 8 bits.
    assert ((total - expected).abs() <= expected.abs() * rounding).all()

    g = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    total.backward(g)
    assert all(torch.equal(y.grad[i], g[t]) for i, (_, t) in enumerate(pairs))
    made.backward(y.detach())
    assert ((x.grad - expected).abs() <= expected.abs() * rounding).all()
    picked.backward(torch.arange(1.0, len(pairs) + 1))
    spread = torch.zeros(TOKENS, EXPERTS)
    for i, (e, t) in enumerate(pairs):
        spread[t, e] = i + 1
    assert torch.equal(weights.grad, spread)
