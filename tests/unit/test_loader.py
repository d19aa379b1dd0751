"""From samples to micro batches: every supervised token once an epoch, on any topology, across stops and resumes."""

import gc
import json
import re
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.data.dataset import Batches, Mix, Samples
from megasft.data.loader import AHEAD, Loader
from megasft.data.micro_batches import MicroBatches, evaluation_rows
from megasft.messages import UserError

CPU = torch.device("cpu")
ROW = 32


def make_samples(lengths, seed=0):
    """Samples in which every token has a unique id; about half of them are supervised, never the first."""
    ends = torch.tensor(lengths).cumsum(0)
    total = int(ends[-1])
    mask = torch.from_numpy(np.random.default_rng(seed).random(total) < 0.5)
    mask[ends - 1] = True
    mask[torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])] = False
    return Samples(torch.arange(total, dtype=torch.int32), mask, ends)


def supervised(samples):
    return Counter(samples.ids[samples.mask].tolist())


def topology(replicas, rank, tensor):
    dp = SimpleNamespace(rank=lambda: rank)
    return SimpleNamespace(sizes=SimpleNamespace(data=replicas, tensor=tensor), groups=SimpleNamespace(dp=dp))


def loaders(mix, global_batch, packing, replicas, per_device_batch, tensor=1, seed=0):
    """A loader for each data-parallel rank."""

    def of_rank(rank):
        place = topology(replicas, rank, tensor)
        return Loader(mix, batches, lambda rows: list(MicroBatches(mix, rows, per_device_batch, place, CPU)))

    batches = Batches.over(mix, global_batch, seed, ROW if packing else None)
    return [of_rank(rank) for rank in range(replicas)], batches


def learned(micro_batches):
    """The supervised tokens of micro batches; asserts that each has the right labels, segments and positions."""
    seen = Counter()
    for batch in micro_batches:
        assert len(batch.tokens) == len(batch.labels) == sum(batch.segments.lengths)
        targets = batch.labels >= 0
        # ids count up within a sample: what is to be predicted is the token's successor in its own conversation
        assert torch.equal(batch.labels[targets], batch.tokens[targets] + 1)
        seen.update(batch.labels[targets].tolist())
    return seen


TOPOLOGY = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2, 4]))
SAMPLES = st.lists(st.integers(2, ROW + 1), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.integers(1, 50), st.booleans(), TOPOLOGY, TOPOLOGY, st.data())
def test_every_supervised_token_is_learned_once_an_epoch_whatever_the_topology_and_across_a_resume(
    lengths, global_batch, packing, before, after, data
):
    samples = make_samples(lengths)
    mix = Mix.of(samples)
    ranks, batches = loaders(mix, global_batch, packing, *before)
    steps = batches.steps(2)
    stop = data.draw(st.integers(0, steps))
    seen = Counter()
    for step in range(steps):
        if step == stop:
            state = json.loads(json.dumps(ranks[0].state_dict()))
            assert all(rank.state_dict() == state for rank in ranks)
            ranks, _ = loaders(mix, global_batch, packing, *after)
            for rank in ranks:
                rank.load_state_dict(state)
        given_ = [next(rank) for rank in ranks]
        assert len({len(one.micro_batches) for one in given_}) == 1
        in_step = sum((learned(one.micro_batches) for one in given_), Counter())
        of_step = [token for i in batches[step] for token in samples[int(i)][0][samples[int(i)][1]].tolist()]
        assert in_step == Counter(of_step)
        fed = torch.cat([samples[int(i)][0][:-1] for i in batches[step]])  # in the order of their places
        for batch in (batch for one in given_ for batch in one.micro_batches):
            real = len(batch.tokens) - batch.segments.padding
            assert torch.equal(fed[batch.places[:real]].long(), batch.tokens[:real])
        assert {one.tokens for one in given_} == {sum(lengths[i] - 1 for i in batches[step])}
        seen += in_step
        if step + 1 == batches.steps(1):
            assert seen == supervised(samples)
    assert seen == supervised(samples) + supervised(samples)


@settings(deadline=None, max_examples=40)
@given(SAMPLES, TOPOLOGY)
def test_evaluation_counts_every_supervised_token_once(lengths, topology_):
    replicas, per_device_batch, tensor = topology_
    mix = Mix.of(make_samples(lengths))
    rows = evaluation_rows(mix, ROW, replicas)
    assert all(len(row) == 1 or mix.lengths[row].sum() <= ROW for row in rows)
    seen = Counter()
    counts = set()
    for rank in range(replicas):
        batches = MicroBatches(mix, rows, per_device_batch, topology(replicas, rank, tensor), CPU)
        counts.add(len(batches))
        seen += learned(batches)
    assert len(counts) == 1
    assert seen == supervised(mix.sources[0])


def test_a_micro_batch_is_padded_to_a_multiple_of_tensor_parallel_only():
    mix = Mix.of(make_samples([6, 8, 3]))
    for tensor, lengths in ((1, [5, 7, 2]), (2, [5, 7, 2]), (4, [5, 7, 2, 2]), (8, [5, 7, 2, 2])):
        (batch,) = MicroBatches(mix, [np.array([0, 1, 2])], 1, topology(1, 0, tensor), CPU)
        assert batch.segments.lengths == lengths
        assert (batch.labels[14:] < 0).all()
    (empty,) = MicroBatches(mix, [0], 1, topology(2, 1, 4), CPU)
    assert empty.segments.lengths == [4]
    assert (empty.labels < 0).all()


def test_a_mix_numbers_the_samples_of_its_sources_through():
    first, second = make_samples([4, 2, 9]), make_samples([3, 5], seed=1)
    mix = Mix((first, second), (1.0, 2.0))
    assert Mix.of(mix) is mix
    assert len(mix) == 5
    assert mix.lengths.tolist() == [3, 1, 8, 2, 4]
    for number, (source, i) in enumerate([(first, 0), (first, 1), (first, 2), (second, 0), (second, 1)]):
        for got, want in zip(mix[number], source[i], strict=True):
            assert torch.equal(got, want)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=3))
def test_a_weight_is_the_number_of_passes_per_epoch(sources):
    mix = Mix(tuple(make_samples([3] * size) for size, _ in sources), tuple(weight for _, weight in sources))
    batches = Batches.over(mix, 7, 5, None)
    epochs = [
        np.concatenate([batches[step] for step in range(batches.steps(e), batches.steps(e + 1))]) for e in range(4)
    ]
    first = 0
    for size, weight in sources:
        taken = max(1, round(size * weight))
        own = [epoch[(epoch >= first) & (epoch < first + size)] for epoch in epochs]
        assert [len(numbers) for numbers in own] == [taken] * 4
        for count in range(1, 5):  # a sample comes up again only when all the others have
            times = np.bincount(np.concatenate(own[:count]) - first, minlength=size)
            assert times.max() - times.min() <= 1
        first += size


def test_each_epoch_has_an_order_of_its_own():
    batches = Batches.over(Mix.of(make_samples([3] * 50)), 50, 5, None)
    orders = [batches[step].tolist() for step in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert len(batches._epochs) == 2, "an order of each epoch is kept for as long as the run lasts"


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.floats(0.0, 0.5), st.integers(0, 1000))
def test_held_out_samples_are_not_trained_on_and_none_is_lost(sizes, fraction, seed):
    total = sum(sizes)
    mix = Mix(tuple(make_samples([3] * size) for size in sizes), tuple(range(1, len(sizes) + 1)))
    if total == 1:
        with pytest.raises(UserError, match="cannot be split"):
            mix.split(fraction, seed)
        return
    kept, held = mix.split(fraction, seed)
    assert len(kept) + len(held) == total
    assert len(held) == min(total - 1, max(1, round(total * fraction)))
    of_weight = {weight: source for source, weight in zip(mix.sources, mix.weights, strict=True)}
    starts = Counter()
    for part in (kept, held):
        for source, weight in zip(part.sources, part.weights, strict=True):
            assert source.ids is of_weight[weight].ids  # no token was copied
            starts.update((weight, start) for start in source.starts.tolist())
    assert starts == Counter(
        (weight, start) for weight, source in of_weight.items() for start in source.starts.tolist()
    )
    assert [source.starts.tolist() for source in mix.split(fraction, seed)[1].sources] == [
        source.starts.tolist() for source in held.sources
    ]


def test_batches_are_prepared_while_the_one_before_is_computed():
    mix = Mix.of(make_samples([4] * 40))
    made = []

    def make(rows):
        made.append(rows)
        return []

    loader = Loader(mix, Batches.over(mix, 4, 0, None), make)
    next(loader)
    deadline = time.monotonic() + 10
    while len(made) < 1 + AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 1 + AHEAD
    assert next(loader).waited < 0.05


def test_the_wait_for_a_slow_batch_is_reported():
    mix = Mix.of(make_samples([4] * 8))

    def slow(rows):
        time.sleep(0.2)
        return []

    assert next(Loader(mix, Batches.over(mix, 4, 0, None), slow)).waited >= 0.2


def test_an_error_in_the_background_is_raised_where_the_batch_is_wanted():
    mix = Mix.of(make_samples([4] * 8))

    def broken(rows):
        raise ValueError("no such page")

    with pytest.raises(ValueError, match="no such page"):
        next(Loader(mix, Batches.over(mix, 4, 0, None), broken))


def test_a_dropped_loader_leaves_no_thread_behind():
    mix = Mix.of(make_samples([4] * 8))
    before = set(threading.enumerate())
    loader = Loader(mix, Batches.over(mix, 4, 0, None), lambda rows: [])
    next(loader)
    (thread,) = set(threading.enumerate()) - before
    del loader
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("a sample more", "9 samples (were 8)"),
        ("a longer sample", "their tokens differ"),
        ("seed", "[job] seed = 1 (was 0)"),
        ("packing", "[data] packing = true (was false)"),
        ("weight", "the weight of source 1 of [data] mix is 2 (was 1.0)"),
    ],
)
def test_resuming_with_other_data_is_refused(change, named):
    lengths = [4] * 8
    (loader,), _ = loaders(Mix.of(make_samples(lengths)), 4, False, 1, 1)
    next(loader)
    lengths = {"a sample more": [4] * 9, "a longer sample": [5, 3] + [4] * 6}.get(change, lengths)
    mix = Mix((make_samples(lengths),), (2.0 if change == "weight" else 1.0,))
    (other,), _ = loaders(mix, 4, change == "packing", 1, 1, seed=int(change == "seed"))
    with pytest.raises(UserError, match=f"not those of the checkpoint: {re.escape(named)}"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("row", [8, 10**9])
def test_resuming_behind_the_last_row_of_an_epoch_is_refused(row):
    (loader,), _ = loaders(Mix.of(make_samples([4] * 8)), 4, False, 1, 1)
    loader.load_state_dict(loader.state_dict() | {"row": 7})
    with pytest.raises(UserError, match=f"row {row} "):
        loader.load_state_dict(loader.state_dict() | {"row": row})
