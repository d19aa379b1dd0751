"""Recomputation changes no number: what is computed again is what it was, whatever ran between forward and backward."""

import pytest
import torch

from megasft.config.values import ALL_LINEAR
from tests.parallel.invariance import Case
from tests.parity.reference import random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, SAMPLES = 4, 8
EXPERTS = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of four layers, one of them dense."""
    made, config = tmp_path_factory.mktemp("recompute"), tiny_config(num_hidden_layers=4, mlp_only_layers=[1])
    random_model(config).save_pretrained(made / "base")
    for name, targets in {"all": ALL_LINEAR, "experts": EXPERTS}.items():
        write_adapter(random_adapter(config, R, frozenset(targets)), made / name, R, 8.0)
    return made


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        # Both stages have micro batches in flight: a forward of a later one comes before the backward of an earlier one.
        (Case(2, pipeline=2), "all"),
        (Case(2, tensor=2, expert_tensor=2), "all"),
        # Nothing before the first layer's experts has a gradient.
        (Case(2, expert=2), "experts"),
    ],
    ids=str,
)
def test_gradients_are_bitwise_those_of_kept_activations(ranks, folder, case, targets):
    samples = on_ranks.random_samples(203, [60, 33, 47, 12, 55, 20, 41, 38])

    def run(recompute):
        return ranks(case.ranks, on_ranks.gradients, {
            "job": {"model": str(folder / "base"), "init_adapter": str(folder / targets), "output_dir": str(folder / "run")},
            "lora": {"r": R, "alpha": 8.0, "dropout": 0.2, "target_modules": EXPERTS if targets == "experts" else ALL_LINEAR},
            "data": {"topology": {
                "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
                "pipeline_parallel": case.pipeline,
            }},
            "hyperparameters": {
                "gradient_accumulation_steps": SAMPLES // case.data, "max_steps": 5,
                "parallelism": {"bf16": False, "activation_checkpointing": recompute},
            },
        }, samples)  # fmt: skip

    kept = run(False)
    assert all(norm > 0 and parts for _, norm, parts in kept)
    for recompute in ("selective", True):
        for (loss, norm, parts), (loss_kept, norm_kept, parts_kept) in zip(run(recompute), kept, strict=True):
            assert loss == loss_kept
            assert norm == norm_kept
            assert parts.keys() == parts_kept.keys()
            different = [name for name, (_, value) in parts.items() if not torch.equal(value, parts_kept[name][1])]
            assert not different, (recompute, different)
