"""On tiny fp32 models, our numbers equal those of transformers with LoRA written out by hand."""

from pathlib import Path

import pytest
import torch

from megasft.config.values import LINEAR_LAYERS
from tests.parity.reference import Reference, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA = 4, 12.0
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
TOPOLOGIES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
MODELS = {
    "dense layer": {},
    "tied head": {"tie_word_embeddings": True, "mlp_only_layers": []},
    "no renormalisation, sparse step 2": {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
             "mlp_only_layers": []},
}  # fmt: skip


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """For each model in MODELS: name -> (settings for megasft, reference), created once."""
    made = {}

    def make(name: str, targets: tuple[str, ...] = LINEAR_LAYERS):
        if (name, targets) not in made:
            config = tiny_config(**MODELS[name])
            folder: Path = tmp_path_factory.mktemp("model")
            model = random_model(config)
            model.save_pretrained(folder / "base", max_shard_size="100KB")
            adapter = random_adapter(config, R, frozenset(targets))
            write_adapter(adapter, folder / "adapter", R, ALPHA)
            settings = {
                "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder / "run")},
                "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(targets)},
                "hyperparameters": {
                    "max_steps": 20, "learning_rate": 5e-3, "warmup_ratio": 0.1, "max_grad_norm": 0.5, "weight_decay": 0.01,
                    "parallelism": {"bf16": False},
                },
            }  # fmt: skip
            made[name, targets] = (settings, Reference(model, adapter, ALPHA / R))
        settings, reference = made[name, targets]
        return {section: dict(values) for section, values in settings.items()}, reference

    return make


def cut(settings: dict, tensor: int, data: int, batch: int = 1, accumulation: int = 1, **topology: int) -> dict:
    settings["data"] = {"topology": {"tensor_parallel": tensor, "data_parallel": data, **topology}}
    settings["hyperparameters"] |= {"per_device_batch": batch, "gradient_accumulation_steps": accumulation}
    return settings


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 2), (4, 1)])
def test_logits_equal_those_of_transformers(ranks, worlds, name, tensor, data):
    settings, reference = worlds(name)
    samples = on_ranks.random_samples(203, LENGTHS)
    with torch.no_grad():
        want = torch.cat([reference.logits(ids) for ids, _ in samples])
    for got in ranks(tensor * data, on_ranks.logits, cut(settings, tensor, data), samples):
        # fp32 rounding over three layers; logits are of the order of 1 to 5.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensor", "data", "accumulation"),
    [("dense layer", *topology, accumulation) for topology in TOPOLOGIES for accumulation in (1, 4)]
    + [(name, *topology, 2) for name in MODELS if name != "dense layer" for topology in ((1, 1), (2, 2))],
)
def test_loss_and_every_lora_gradient_equal_those_of_transformers(ranks, worlds, name, tensor, data, accumulation):
    settings, reference = worlds(name)
    batch = 8 // data // accumulation
    if batch == 0:
        batch = 1  # 4 ranks x 4 micro batches: half of them stay empty
    samples = on_ranks.random_samples(203, LENGTHS)
    want = reference.loss(samples)
    want_grads = dict(zip(reference.adapter, torch.autograd.grad(want, list(reference.adapter.values())), strict=True))
    answers = ranks(tensor * data, on_ranks.gradients, cut(settings, tensor, data, batch, accumulation), samples)
    for loss, _, _ in answers:
        assert loss == pytest.approx(want.item(), rel=1e-5)
    got = on_ranks.assemble([parts for *_, parts in answers], {k: v.shape for k, v in reference.adapter.items()})
    for name, grad in want_grads.items():
        # Relative to the largest entry: fp32 sums of hundreds of terms in another order.
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, name


@pytest.mark.parametrize(
    ("tensor", "data", "accumulation"), [(1, 1, 1), (1, 1, 4), (2, 2, 1), (1, 4, 1), (4, 1, 2), (2, 1, 4)]
)
def test_twenty_steps_of_loss_and_gradient_norm_equal_adamw_on_transformers(ranks, worlds, tensor, data, accumulation):
    settings, reference = worlds("dense layer")
    samples = on_ranks.random_samples(203, LENGTHS * 2)
    settings = cut(settings, tensor, data, 4 // data // accumulation or 1, accumulation)
    got = ranks(tensor * data, on_ranks.loss_curve, settings, samples, 20)[0]
    want = reference_curve(reference, settings, samples, 20)
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours["loss"] == pytest.approx(theirs[0], rel=1e-4), f"step {step}"
        assert ours["grad_norm"] == pytest.approx(theirs[1], rel=1e-3), f"step {step}"


def reference_curve(reference: Reference, settings: dict, samples: list, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) per step with torch's AdamW and clipping and transformers' schedule, on a copy of the reference."""
    from transformers import get_scheduler

    from megasft.config.schema import RunConfig
    from megasft.data.dataset import Batches

    config = RunConfig.from_dict(settings)
    hyper = config.hyperparameters
    mine = Reference(
        reference.model, {name: value.detach() for name, value in reference.adapter.items()}, reference.scaling
    )
    adapters = list(mine.adapter.values())
    optimizer = torch.optim.AdamW(adapters, hyper.learning_rate, weight_decay=hyper.weight_decay)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=20)
    data = settings["data"]["topology"]["data_parallel"]
    batches = Batches(len(samples), hyper.per_device_batch * hyper.gradient_accumulation_steps * data, config.job.seed)
    curve = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = mine.loss([samples[int(i)] for i in batches[step]])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(adapters, hyper.max_grad_norm)
        optimizer.step()
        scheduler.step()
        curve.append((loss.item(), float(norm)))
    return curve
