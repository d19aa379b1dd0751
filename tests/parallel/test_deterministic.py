"""`[job] deterministic`: two runs with one topology are bitwise equal."""

from pathlib import Path

import torch

from megasft import host
from megasft.train.trainer import Trainer
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

STEPS = 4


def train(settings, samples):
    """(records without times, this rank's parts of the adapter)."""
    host.be_deterministic()
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    records = [trainer.train_step() for _ in range(STEPS)]
    assert torch.are_deterministic_algorithms_enabled()
    assert model.config.deterministic_mode
    return [(record["loss"], record["grad_norm"]) for record in records], on_ranks.adapter_parts(model)


def test_two_deterministic_runs_are_bitwise_equal(ranks, tmp_path: Path):
    config = tiny_config()
    random_model(config).save_pretrained(tmp_path / "base")
    settings = {
        "job": {"model": str(tmp_path / "base"), "output_dir": str(tmp_path), "deterministic": True},
        "lora": {"r": 4, "dropout": 0.3, "target_modules": ["all-linear", "gate"]},
        "data": {"topology": {"tensor_parallel": 2}},
        "hyperparameters": {
            "per_device_batch": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
        },
    }  # fmt: skip
    samples = on_ranks.random_samples(config.vocab_size, [5 + 7 * i % 23 for i in range(20)])
    first, second = (ranks(4, train, settings, samples) for _ in range(2))
    for (curve, parts), (other_curve, other_parts) in zip(first, second, strict=True):
        assert len(set(curve)) == STEPS
        assert curve == other_curve
        assert parts.keys() == other_parts.keys()
        assert all(value.equal(other_parts[name][1]) for name, (_, value) in parts.items())
