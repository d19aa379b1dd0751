"""Rows, epochs and global batches: every sample once, whatever the sizes."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.data.dataset import Batches
from megasft.data.micro_batches import deal
from megasft.data.packing import WINDOW, Rows, pack

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=200).map(np.array)


def log_normal(count, seed=0):
    """Tokens of conversations: median 600, at most 4096."""
    return np.exp(np.random.default_rng(seed).normal(np.log(600), 1.0, count)).astype(np.int64).clip(2, 4096)


def each(rows):
    return [rows[i].tolist() for i in range(len(rows))]


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 2**32))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths, seed):
    numbers = np.random.default_rng(seed).permutation(len(lengths)) + 7
    rows = pack(numbers, lengths[numbers - 7], 64)
    assert sorted(itertools.chain(*each(rows))) == sorted(numbers)
    for row in each(rows):
        assert row
        assert len(row) == 1 or sum(lengths[number - 7] for number in row) <= 64


def test_samples_share_a_row_with_others_of_their_window_only():
    rows = pack(np.arange(3 * WINDOW), log_normal(3 * WINDOW), 4096)
    assert all(len({number // WINDOW for number in row}) == 1 for row in each(rows))


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 2**32))
def test_shuffling_moves_whole_rows(lengths, seed):
    rows = pack(np.arange(len(lengths)), lengths, 64)
    shuffled = rows.shuffled(np.random.default_rng(seed))
    assert sorted(each(shuffled)) == sorted(each(rows))
    assert len(rows) < 8 or each(rows.shuffled(np.random.default_rng(1))) != each(
        rows.shuffled(np.random.default_rng(2))
    )


@pytest.mark.parametrize("count", [500, 20_000])
def test_rows_of_log_normal_lengths_are_full(count):
    lengths = log_normal(count)
    rows = Batches(count, 1, seed=0, lengths=lengths, row_length=4096).epoch(0)
    assert lengths.sum() / (len(rows) * 4096) >= 0.98


BATCHES = st.builds(
    lambda lengths, global_batch, seed, packed: Batches(
        len(lengths), global_batch, seed, lengths=lengths, row_length=64 if packed else None
    ),
    LENGTHS,
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)


@settings(deadline=None)
@given(BATCHES, st.integers(1, 3))
def test_an_epoch_trains_on_every_sample_once(batches, epochs):
    step = 0
    for epoch in range(epochs):
        seen = Counter()
        for within in range(batches.steps_in(epoch)):
            assert batches.place(step) == (epoch, within * batches.global_batch)
            seen.update(batches[step].tolist())
            step += 1
        assert seen == Counter(range(batches.samples))
    assert step == batches.steps(epochs)


@settings(deadline=None)
@given(BATCHES)
def test_only_the_last_global_batch_of_an_epoch_may_be_smaller(batches):
    sizes = [len(batches.rows(*batches.place(step))) for step in range(batches.steps_in(0))]
    assert all(size == batches.global_batch for size in sizes[:-1])
    assert 0 < sizes[-1] <= batches.global_batch


@pytest.mark.parametrize("row_length", [None, 64])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(row_length):
    lengths = np.random.default_rng(0).integers(1, 60, 500)

    def order(seed, epoch, global_batch=8):
        batches = Batches(500, global_batch, seed, lengths=lengths, row_length=row_length)
        return np.concatenate(batches.rows(epoch, 0)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0))}) == 3
    whole = order(0, 0, 1000)
    assert whole[: len(order(0, 0))] == order(0, 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 3.5)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 5),
)
def test_each_source_of_a_mix_is_passed_as_often_as_its_weight_says(sources, packed, epochs):
    total = sum(size for size, _ in sources)
    lengths = np.full(total, 10)
    batches = Batches(total, 16, 0, tuple(sources), lengths, 64 if packed else None)
    seen = Counter()
    for epoch in range(epochs):
        numbers = batches.epoch(epoch).numbers
        seen.update(numbers.tolist())
        first = 0
        for size, weight in sources:
            of_source = Counter(numbers[(numbers >= first) & (numbers < first + size)].tolist())
            assert of_source.total() == max(1, round(size * weight))
            first += size
    first = 0
    for size, weight in sources:
        times = [seen[number] for number in range(first, first + size)]
        assert sum(times) == epochs * max(1, round(size * weight))
        assert max(times) - min(times) <= 1  # nobody comes up again before all others have
        first += size


def test_sources_of_a_mix_are_mixed():
    batches = Batches(200, 10, 0, ((100, 1.0), (100, 1.0)))
    assert all(0 < (batches[step] < 100).sum() < 10 for step in range(20))


@settings(deadline=None)
@given(st.lists(st.integers(0, 4096), max_size=80), st.integers(1, 5), st.integers(1, 6))
def test_rows_are_dealt_once_and_evenly(tokens, per_device_batch, replicas):
    dealt = deal(np.array(tokens, np.int64), per_device_batch, replicas)
    assert sorted(row for cuts in dealt for cut in cuts for row in cut) == list(range(len(tokens)))
    assert {len(cuts) for cuts in dealt} == {-(-len(tokens) // (per_device_batch * replicas))}
    assert all(len(cut) <= per_device_batch for cuts in dealt for cut in cuts)
    sums = [sum(tokens[row] for cut in cuts for row in cut) for cuts in dealt]
    if per_device_batch == 1 and tokens:
        assert max(sums) - min(sums) <= max(tokens)


def test_ranks_compute_about_as_much_as_each_other_at_any_time():
    tokens = log_normal(128)
    dealt = deal(tokens, 1, 4)
    sums = [sum(tokens[row] for cut in cuts for row in cut) for cuts in dealt]
    assert max(sums) < 1.02 * min(sums)
    at_once = [[sum(tokens[row] for row in cut) for cut in together] for together in zip(*dealt, strict=True)]
    waited = sum(max(together) * 4 - sum(together) for together in at_once) / tokens.sum()
    assert waited < 0.1  # dealt in the order of the file, more than half of the time


def test_rows_of_one_sample_are_rows():
    assert each(Rows.single(np.array([5, 3, 9]))) == [[5], [3], [9]]
