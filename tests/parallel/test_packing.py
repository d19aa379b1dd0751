"""Packing changes speed, not results: loss, gradients and steps are those of single conversations."""

import numpy as np
import pytest

from megasft.config.values import LINEAR_LAYERS
from megasft.data.dataset import Mix
from megasft.data.micro_batches import evaluation_rows
from megasft.train.trainer import Trainer
from tests.parity.reference import linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ROW = 4, 48
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9, 14, 26, 5, 12]
ROWS = [[0, 2], [1, 3, 4, 5], [6], [7, 8, 10, 11], [9]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    random_model(config).save_pretrained(folder / "base")
    write_adapter(random_adapter(config, R, frozenset(LINEAR_LAYERS)), folder / "adapter", R, 12.0)

    def make(tensor=1, data=1, packing=False, **hyperparameters):
        return {
            "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder)},
            "lora": {"r": R, "alpha": 12.0, "dropout": 0.0, "target_modules": LINEAR_LAYERS},
            "data": {"packing": packing, "topology": {"tensor_parallel": tensor, "data_parallel": data}},
            "hyperparameters": {"sequence_length": ROW, "parallelism": {"bf16": False}, **hyperparameters},
        }

    return make


def gradients_of_rows(settings, samples, rows):
    """`on_ranks.gradients` of a global batch of these rows."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    run = trainer._run
    trainer._run = lambda mix, _, training: run(mix, rows, training)
    return on_ranks.measure_gradients(trainer, len(samples))


def evaluations(settings, samples):
    """(the loss of `evaluate`, the loss of the single samples), each with its number of tokens."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    return trainer.evaluate(trainer.train), trainer._run(trainer.train, range(len(samples)), training=False)


@pytest.mark.parametrize(("tensor", "data", "batch"), [(1, 1, 1), (1, 1, 3), (2, 2, 1), (1, 4, 2), (4, 1, 2)])
def test_loss_and_every_lora_gradient_of_packed_rows_equal_those_of_the_unpacked(ranks, settings, tensor, data, batch):
    samples = on_ranks.random_samples(203, LENGTHS)
    shapes = {}
    for name, (n, k) in linear_shapes(tiny_config()).items():
        shapes |= {f"{name}.lora_A.weight": (R, k), f"{name}.lora_B.weight": (n, R)}
    alone = ranks(1, on_ranks.gradients, settings(per_device_batch=1), samples)
    rows = [np.array(row) for row in ROWS]
    packed = ranks(tensor * data, gradients_of_rows, settings(tensor, data, per_device_batch=batch), samples, rows)
    assert packed[0][0] == pytest.approx(alone[0][0], rel=1e-5)
    want = on_ranks.assemble([parts for *_, parts in alone], shapes)
    got = on_ranks.assemble([parts for *_, parts in packed], shapes)
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_training_packed_takes_the_steps_of_training_unpacked_on_the_same_global_batches(ranks, settings):
    # A global batch that holds all samples is the same one, in rows or not.
    samples = on_ranks.random_samples(203, LENGTHS)
    steps = {"max_steps": 4, "learning_rate": 1e-2, "adam_eps": 1e-5}
    alone = ranks(1, on_ranks.loss_curve, settings(per_device_batch=12, **steps), samples, 4)[0]
    for tensor, data in ((1, 1), (2, 2)):
        packed = settings(tensor, data, True, per_device_batch=2, gradient_accumulation_steps=12, **steps)
        for got in ranks(tensor * data, on_ranks.loss_curve, packed, samples, 4):
            for key in ("loss", "grad_norm", "tokens", "supervised_tokens"):
                assert [record[key] for record in got] == pytest.approx([record[key] for record in alone], rel=1e-4)
    assert alone[0]["loss"] > 1.01 * alone[-1]["loss"], "nothing was learned that could be compared"


def test_packed_training_counts_rows_in_its_global_batches(ranks, settings):
    samples = on_ranks.random_samples(203, LENGTHS)
    rows = -(-sum(length - 1 for length in LENGTHS) // ROW)
    records = ranks(2, on_ranks.loss_curve, settings(1, 2, True, n_epochs=2), samples, 2 * -(-rows // 2))[0]
    fed = sum(length - 1 for length in LENGTHS)
    assert sum(record["tokens"] for record in records) == 2 * fed
    assert all(record["tokens"] <= 2 * ROW for record in records)


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 2), (1, 4)])
def test_evaluation_packs_and_gives_the_loss_of_the_samples_one_by_one(ranks, settings, tensor, data):
    samples = on_ranks.random_samples(203, LENGTHS)
    assert len(evaluation_rows(Mix.of(on_ranks.as_samples(samples)), ROW, data)) < len(samples)
    for packed, alone in ranks(tensor * data, evaluations, settings(tensor, data), samples):
        assert packed == pytest.approx(alone, rel=1e-5)
