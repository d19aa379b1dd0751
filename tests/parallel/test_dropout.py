"""LoRA's dropout in the layers: how much it drops, what makes up for it, on which ranks it is the same, and when it rests."""

from collections import defaultdict

import pytest
import torch

from megasft.lora import grouped, linear
from megasft.train.trainer import Trainer
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

P, R, ALPHA = 0.3, 4, 12.0


def uses(settings, samples):
    """(mode, mask, scaling) of every product of a step and, apart from them, of an evaluation; the loss of the latter."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    found, modes = [], []
    for module, product in ((linear, "lora_linear"), (grouped, "grouped_lora_linear")):
        multiply = getattr(module, product)

        def spied(*args, multiply=multiply):
            x, scaling, drop = args[0], args[5], args[-2]
            found.append((modes[-1], None if drop is None else drop(torch.ones_like(x)).bool(), scaling))
            return multiply(*args)

        setattr(module, product, spied)
    for layer in model.modules():
        if isinstance(layer, linear.LoraLinear | grouped.GroupedLoraLinear):
            kind = "expert " * isinstance(layer, grouped.GroupedLoraLinear) + layer.mode
            layer.register_forward_pre_hook(lambda _, __, kind=kind: modes.append(kind))
    trainer.train_step()
    trained = list(found)
    found.clear()
    loss, *_ = trainer.evaluate(trainer.train)
    return trained, list(found), loss


@pytest.fixture(scope="module")
def answers(ranks, tmp_path_factory):
    """`uses` on each of two tensor-parallel ranks; the loss of an evaluation of the same adapters without dropout."""
    folder = tmp_path_factory.mktemp("dropout")
    random_model(tiny_config()).save_pretrained(folder / "base")
    samples = on_ranks.random_samples(203, [60] * 8)

    def settings(dropout):
        return {
            "job": {"model": str(folder / "base"), "output_dir": str(folder / "run")},
            "lora": {"r": R, "alpha": ALPHA, "dropout": dropout, "target_modules": ["all-linear", "gate"]},
            "data": {"topology": {"tensor_parallel": 2, "expert_tensor_parallel": 2}},
            "hyperparameters": {"per_device_batch": 8, "n_epochs": 2, "warmup_ratio": 0.5, "parallelism": {
                "bf16": False, "activation_checkpointing": False,
            }},
        }  # fmt: skip

    # The first step of a warm-up has a rate of zero, so both runs evaluate the adapters that they began with.
    return ranks(2, uses, settings(P), samples), ranks(2, uses, settings(0.0), samples)[0][2]


def masks(trained):
    by_mode = defaultdict(list)
    for mode, mask, _ in trained:
        by_mode[mode].append(mask)
    return by_mode


def test_each_product_drops_its_share_and_makes_up_for_it(answers):
    for trained, _, _ in answers[0]:
        assert {mode for mode, *_ in trained} == {"column", "row", "expert column", "expert row"}
        assert {scaling for *_, scaling in trained} == {ALPHA / R / (1 - round(P * 2**16) / 2**16)}
        for mode, found in masks(trained).items():
            kept, total = sum(int(mask.sum()) for mask in found), sum(mask.numel() for mask in found)
            # Binomial: 5 standard deviations, of thousands of elements.
            assert abs(kept - (1 - P) * total) <= 5 * (total * P * (1 - P)) ** 0.5, mode
            assert len({mask.numpy().tobytes() for mask in found}) == len(found), f"{mode}: layers drop alike"
        for mask in masks(trained)["expert column"]:
            assert len(mask.unique(dim=0)) == len(mask), "two experts of a token drop alike"


def test_ranks_with_the_same_input_drop_the_same_of_it_and_others_do_not(answers):
    first, second = (masks(trained) for trained, _, _ in answers[0])
    for mode, found in first.items():
        for mine, other in zip(found, second[mode], strict=True):
            assert torch.equal(mine, other) == mode.endswith("column"), mode


def test_nothing_is_dropped_in_an_evaluation(answers):
    with_dropout, without = answers
    for _, evaluated, loss in with_dropout:
        assert evaluated
        assert {mask for _, mask, _ in evaluated} == {None}
        assert {scaling for *_, scaling in evaluated} == {ALPHA / R}
        assert loss == without
