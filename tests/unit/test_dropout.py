"""Which elements the dropout of the adapters' input drops: how many, independent of what, and the same in Triton."""

import functools

import pytest
import torch

from megasft.lora.dropout import SHARES, Dropout, JoinPlaces, SplitPlaces, key, share
from tests.unit.triton_modules import load

T, K, P = 512, 768, 0.3
PLACES = torch.arange(T)


@functools.cache
def centered(seed=1, name="model.layers.0.mlp.experts.down", experts=1, expert=0, first=0):
    """The dropped elements of [T, K], with mean 0 and variance 1 if each is dropped with probability P."""
    drop = Dropout(PLACES * experts + expert, key(seed, name), first, share(P))
    dropped = (drop(torch.ones(T, K)) == 0).double()
    return (dropped - P) / (P * (1 - P)) ** 0.5


def assert_mean_zero(values, what):
    # The mean of n independent values of variance 1 has a standard deviation of n^-1/2. All is deterministic here.
    assert abs(values.mean()) * values.numel() ** 0.5 < 4, what


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.5, 0.95])
def test_the_share_of_dropped_elements_is_p(p):
    x = torch.ones(1024, 1024)
    dropped = sum(int((Dropout(torch.arange(1024), key(seed, "q"), 0, share(p))(x) == 0).sum()) for seed in range(4))
    n = 4 * x.numel()
    assert abs(share(p) / SHARES - p) <= 0.5 / SHARES
    assert abs(dropped - n * p) < 4 * (n * p * (1 - p)) ** 0.5 + n * 0.5 / SHARES


def test_neighbors_of_any_kind_are_dropped_independently():
    c = centered()
    for rows, columns in [(0, 1), (0, 2), (0, 3), (0, 16), (0, 64), (0, 256), (1, 0), (2, 0), (8, 0), (64, 0), (1, 1), (2, 2), (16, 64)]:  # fmt: skip
        assert_mean_zero(c[rows:, columns:] * c[: T - rows, : K - columns], f"{rows} rows and {columns} features on")
    assert_mean_zero(c[1:, :-1] * c[:-1, 1:], "the other diagonal")


def test_steps_layers_and_experts_are_dropped_independently():
    c = centered(experts=8)
    others = {
        "the next step": centered(seed=2, experts=8),
        "another layer": centered(name="model.layers.1.mlp.experts.down", experts=8),
        "another linear layer": centered(name="model.layers.0.mlp.experts.gate_up", experts=8),
        "the next expert": centered(experts=8, expert=1),
    }
    for what, other in others.items():
        assert_mean_zero(c * other, what)
        assert_mean_zero(c[1:] * other[:-1], f"{what}, the next token")
        assert_mean_zero(c[:, 1:] * other[:, :-1], f"{what}, the next feature")


def test_no_row_and_no_feature_is_dropped_more_than_others():
    c = centered()
    for dim in (0, 1):
        sums = c.sum(dim) / c.shape[dim] ** 0.5  # normal with variance 1
        assert abs(sums.square().mean() - 1) < 4 * (2 / len(sums)) ** 0.5
        assert sums.abs().max() < 5


def test_corners_of_rectangles_are_dropped_independently():
    """The hashes of two rows differ by the same bits in every feature, before they are mixed; afterwards none shows."""
    c, draw = centered(), torch.Generator().manual_seed(0)
    t = torch.randint(0, T, (2, 400_000), generator=draw)
    k = torch.randint(0, K, (2, 400_000), generator=draw)
    apart = (t[0] != t[1]) & (k[0] // 2 != k[1] // 2)
    corners = c[t[0], k[0]] * c[t[0], k[1]] * c[t[1], k[0]] * c[t[1], k[1]]
    assert_mean_zero(corners[apart], "four corners")


@pytest.mark.parametrize("first", [0, 1, 64, 301])
def test_a_rank_drops_of_its_features_what_all_ranks_together_drop(first):
    whole = centered()
    drop = Dropout(PLACES, key(1, "model.layers.0.mlp.experts.down"), first, share(P))
    assert torch.equal(drop(torch.ones(T, 100)) == 0, whole[:, first : first + 100] > 0)
    rows = torch.tensor([5, 500, 5])
    drop = Dropout(PLACES[rows], key(1, "model.layers.0.mlp.experts.down"), 0, share(P))
    assert torch.equal(drop(torch.ones(3, K)) == 0, whole[rows] > 0)


def test_what_is_kept_is_unchanged_in_every_dtype_and_layout():
    drop = Dropout(torch.arange(40), key(3, "o"), 0, share(0.5))
    kept = drop(torch.ones(40, 33)) == 1
    for x in (torch.randn(40, 33), torch.randn(40, 33).bfloat16(), torch.randn(33, 40).t(), torch.randn(40, 66)[:, ::2]):  # fmt: skip
        before = x.clone()
        assert torch.equal(drop(x), torch.where(kept, x, 0))
        assert torch.equal(x, before)
    assert drop(torch.full((40, 33), torch.nan)).isnan().sum() == kept.sum()
    assert Dropout(torch.arange(0), 1, 0, 1)(torch.ones(0, 33)).shape == (0, 33)


def test_places_come_back_with_the_bits_of_the_routing_weights():
    weights = torch.tensor([[1.0, 0.0, -0.0], [2**-149, 1e-30, 0.3]], requires_grad=True)
    joined = JoinPlaces.apply(weights, torch.tensor([0, 2**29 - 1]))
    assert joined.isfinite().all()
    chosen, places = SplitPlaces.apply(joined.flatten()[[5, 0, 4, 3, 2]])
    assert torch.equal(chosen.view(torch.int32), weights.flatten()[[5, 0, 4, 3, 2]].view(torch.int32))
    assert places.tolist() == [2**29 - 1, 0, 2**29 - 1, 2**29 - 1, 0]
    (grad,) = torch.autograd.grad((chosen * torch.tensor([1.0, 2, 3, 4, 5])).sum(), weights)
    assert grad.tolist() == [[2, 0, 5], [4, 3, 1]]


def test_triton_gives_the_same_bits(monkeypatch):
    """As `megasft.kernels.factors` drops: of a gradient of ones."""
    draw = torch.Generator().manual_seed(0)
    for t, k, first in [(37, 64, 0), (37, 61, 5), (5, 300, 128), (16, 5, 15), (0, 8, 0), (3, 1, 7)]:
        counters, number = torch.randint(0, 2**45, (t,), generator=draw), key(7, f"{t}")
        drop = Dropout(counters, number, first, share(P))
        kept, kernels = torch.zeros(t, k), load(monkeypatch, "factors", interpreted=True)
        factors = torch.ones(t, 16), torch.full((16, k), 1 / 16)
        kernels.down_gradient_x(kept, *factors, counters, number, drop.first, drop.share, None)
        assert torch.equal(kept, drop(torch.ones(t, k)))
