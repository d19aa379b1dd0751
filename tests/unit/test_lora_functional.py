"""The two products: values and every gradient are those that autograd gives of the formula, with and without dropout."""

import itertools

import pytest
import torch

from megasft.lora.functional import frozen_linear, grouped_linear, grouped_lora_linear, lora_linear

R, SCALING = 8, 0.75
PARTS = [slice(0, 16), slice(24, 40)]  # what lies between them is a layer without an adapter
ROWS = [5, 0, 9, 0, 3, 7]  # of each expert


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(x, weight, A, B, columns, mask):
    """y = x W^T + s drop(x) A^T B^T of one layer."""
    h = (x if mask is None else x * mask) @ A.t()
    y = x @ weight.t()
    for n, (at, b) in enumerate(zip(columns, B, strict=True)):
        delta = SCALING * h[:, n * R : (n + 1) * R] @ b.t()
        y = y + torch.nn.functional.pad(delta, (at.start, y.shape[1] - at.stop))
    return y


def gradients(y, x, A, B):
    """y and the gradients of a random weighted sum of it."""
    wanted = [x] * x.requires_grad + [A, *B]
    return [y, *torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), wanted)]


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        # fp32 sums of at most 64 terms in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.detach().abs().max().item())


def factors(*experts: int, k: int):
    A = random(*experts, len(PARTS) * R, k, seed=2)
    B = [random(*experts, at.stop - at.start, R, seed=3 + n) for n, at in enumerate(PARTS)]
    return A.requires_grad_(), [b.requires_grad_() for b in B]


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("first", [False, True], ids=["x has a gradient", "x has none"])
def test_a_linear_layer_is_the_formula(dropped, first):
    x, weight = random(24, 64, seed=0).requires_grad_(not first), random(48, 64, seed=1)
    A, B = factors(k=64)
    mask = random(24, 64, seed=5) > -0.5 if dropped else None
    got = lora_linear(x, weight, A, B, PARTS, SCALING, None if mask is None else mask.mul)
    assert_same(gradients(got, x, A, B), gradients(formula(x, weight, A, B, PARTS, mask), x, A, B))


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("first", [False, True], ids=["x has a gradient", "x has none"])
@pytest.mark.parametrize("k", [64, 61], ids=["aligned", "odd strides"])  # grouped kernels want strides of 16 bytes
def test_a_layer_of_experts_is_the_formula_of_each_with_its_rows(dropped, first, k):
    x, weight = random(sum(ROWS), k, seed=0).requires_grad_(not first), random(len(ROWS), 48, k, seed=1)
    A, B = factors(len(ROWS), k=k)
    mask = random(sum(ROWS), k, seed=5) > -0.5 if dropped else None
    ends = list(itertools.accumulate(ROWS))
    got = grouped_lora_linear(
        x, weight, A, B, PARTS, SCALING, torch.tensor(ends).int(), None if mask is None else mask.mul
    )
    spans = [slice(end - rows, end) for end, rows in zip(ends, ROWS, strict=True)]
    want = torch.cat([
        formula(x[at], weight[e], A[e], [b[e] for b in B], PARTS, None if mask is None else mask[at])
        for e, at in enumerate(spans)
    ])  # fmt: skip
    assert_same(gradients(got, x, A, B), gradients(want, x, A, B))


@pytest.mark.parametrize("k", [64, 61], ids=["aligned", "odd strides"])
def test_layers_without_adapters_are_products_with_frozen_weights(k):
    x, weight = random(sum(ROWS), k, seed=0).requires_grad_(), random(len(ROWS), 48, k, seed=1).requires_grad_()
    offsets, weights = torch.tensor(ROWS).cumsum(0).int(), weight.repeat_interleave(torch.tensor(ROWS), 0)
    for got, want in (
        (frozen_linear(x, weight[0]), x @ weight[0].detach().t()),
        (grouped_linear(x, weight, offsets), torch.einsum("tk,tnk->tn", x, weights.detach())),
    ):
        upstream = random(*want.shape, seed=9)
        of_x, of_weight = torch.autograd.grad((got * upstream).sum(), (x, weight), allow_unused=True)
        assert of_weight is None
        assert_same([got, of_x], [want, *torch.autograd.grad((want * upstream).sum(), x)])
