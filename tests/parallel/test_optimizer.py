"""The distributed optimizer: each data-parallel rank keeps its share of the states."""

import pytest

from megasft.config.schema import RunConfig
from megasft.train.optimizer import optimizer_state_bytes
from megasft.train.trainer import Trainer
from tests.parity.reference import linear_shapes, random_model, tiny_config
from tests.support import on_ranks


def state_bytes(settings, samples):
    """(bytes of optimizer state, trained parameters) on this rank after one step."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.train_step()
    return optimizer_state_bytes(trainer.optimizer), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bf16", [False, True])
def test_optimizer_state_shrinks_as_one_over_data_parallel(ranks, tmp_path, bf16):
    random_model(tiny_config()).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [20] * 8)
    for data in (1, 2, 4):
        settings = {
            "job": {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "run")},
            "lora": {"r": 8, "target_modules": ["all-linear", "gate"]},
            "data": {"topology": {"data_parallel": data}},
            "hyperparameters": {"per_device_batch": 8 // data, "parallelism": {"bf16": bf16}},
        }
        answers = ranks(data, state_bytes, settings, samples)
        trained = answers[0][1]
        targets = RunConfig.from_dict(settings).lora.targets
        shapes = [shape for name, shape in linear_shapes(tiny_config()).items() if name.rpartition(".")[2] in targets]
        assert trained == sum(8 * (n + k) for n, k in shapes)  # no rank of an expert's factors is padding
        # fp32 master weight and two moments: 12 bytes a parameter, shared out.
        assert sum(size for size, _ in answers) == pytest.approx(12 * trained, rel=0.01)
        for size, _ in answers:
            assert size == pytest.approx(12 * trained / data, rel=0.02)
