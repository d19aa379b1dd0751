"""Tokens choose experts; copies of them are made, weighed and summed as by indexing, forward and backward."""

import pytest
import torch

from megasft.model.copies import Copies
from megasft.model.routing import count_experts, top_experts

TOKENS, EXPERTS, CHOICES, HIDDEN = 7, 5, 3, 6
PLACES = torch.tensor([40, 2, 7, 11, 0, 2**28, 5])


def choices(per_token):
    """int32 [T, k]: so many experts for each token, ascending, among dropped ones."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.full((TOKENS, CHOICES), EXPERTS, dtype=torch.int32)
    for t, n in enumerate(per_token):
        at = torch.randperm(CHOICES, generator=draw)[:n].sort().values
        chosen[t, at] = torch.randperm(EXPERTS, generator=draw)[:n].sort().values.int()
    return chosen


@pytest.mark.parametrize("here", [range(EXPERTS), range(1, 3)], ids=str)
@pytest.mark.parametrize("per_token", [[3] * TOKENS, [0, 3, 1, 0, 3, 2, 0], [0] * TOKENS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_are_sorted_by_expert_and_sums_are_those_of_a_loop(per_token, here, dtype):
    chosen, rounding = choices(per_token), 0.0 if dtype == torch.float32 else 2.0**-8
    pairs = [(e, t, j) for e in here for t in range(TOKENS) for j in range(CHOICES) if chosen[t, j] == e]
    copies = Copies.of(chosen, here, len(pairs), EXPERTS, PLACES)
    assert copies.tokens.tolist() == [t for _, t, _ in pairs]
    assert copies.ends.tolist() == [sum(e <= last for e, _, _ in pairs) for last in here]
    assert copies.counters.tolist() == [int(PLACES[t]) * EXPERTS + e for e, t, _ in pairs]
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weights = torch.randn(TOKENS, CHOICES, requires_grad=True)
    made, picked = copies.make(x), copies.pick(weights)
    assert made.shape == (len(pairs), HIDDEN)
    assert all(torch.equal(made[i], x[t]) and picked[i] == weights[t, j] for i, (_, t, j) in enumerate(pairs))

    y = torch.randn(len(pairs), HIDDEN, dtype=dtype, requires_grad=True)
    total = copies.add_up(y)
    expected = torch.zeros(TOKENS, HIDDEN)
    for i, (_, t, _) in enumerate(pairs):
        expected[t] += y[i].float()
    # Summed in fp32 in the order of the experts and rounded once: by 2^-8 at most, as bf16 has 8 bits.
    assert ((total - expected).abs() <= expected.abs() * rounding).all()

    g = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    total.backward(g)
    assert all(torch.equal(y.grad[i], g[t]) for i, (_, t, _) in enumerate(pairs))
    made.backward(y.detach())
    assert ((x.grad - expected).abs() <= expected.abs() * rounding).all()
    picked.backward(torch.arange(1.0, len(pairs) + 1))
    spread = torch.zeros(TOKENS, CHOICES)
    for i, (_, t, j) in enumerate(pairs):
        spread[t, j] = i + 1
    assert torch.equal(weights.grad, spread)


@pytest.mark.parametrize("over_all", [False, True])
def test_weights_are_a_softmax_with_its_gradient(over_all):
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    weights, chosen = top_experts(logits, CHOICES, over_all)
    order = logits.detach().argsort(1, descending=True)[:, :CHOICES].sort(1).values
    assert torch.equal(chosen.long(), order)
    among = logits if over_all else logits.gather(1, order)
    want = among.softmax(1).gather(1, order) if over_all else among.softmax(1)
    torch.testing.assert_close(weights, want, rtol=0, atol=1e-15)
    torch.autograd.gradcheck(lambda given: top_experts(given, CHOICES, over_all)[0], logits)


def test_experts_are_counted_without_padding_and_dropped_choices():
    chosen, counts = choices([3, 3, 1, 0, 2, 3, 2]), torch.arange(EXPERTS)
    real = torch.tensor([True, False, True, True, True, True, False])
    count_experts(counts, chosen, real)
    assert counts.tolist() == [e + int((chosen[real] == e).sum()) for e in range(EXPERTS)]
    count_experts(counts, chosen, None)
    assert counts.tolist() == [e + int((chosen[real] == e).sum() + (chosen == e).sum()) for e in range(EXPERTS)]
