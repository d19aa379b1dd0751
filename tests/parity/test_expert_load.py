"""Token counts of all experts and the load-balancing loss equal those of one transformers forward of the global batch."""

import pytest
import torch
from torch.func import functional_call

from megasft.config.values import LINEAR_LAYERS
from megasft.train.expert_load import imbalances
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parity.reference import Reference, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA, COEFFICIENT, BATCH = 4, 12.0, 0.7, 8
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
CASES = [
    Case(1, batch=8), Case(1), Case(2, batch=2), Case(2, tensor=2, batch=2), Case(2, tensor=2, expert_tensor=2, batch=8),
    Case(2, expert=2, batch=4), Case(2, pipeline=2, batch=2), Case(4, tensor=2, expert=2, batch=2),
    Case(4, tensor=2, pipeline=2), Case(4, expert=2, expert_tensor=2), Case(4, tensor=4, batch=3),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(settings of a case, samples, the reference's numbers)."""
    config, folder = tiny_config(num_hidden_layers=4), tmp_path_factory.mktemp("model")
    model, adapter = random_model(config), random_adapter(config, R, frozenset(LINEAR_LAYERS))
    model.save_pretrained(folder / "base")
    write_adapter(adapter, folder / "adapter", R, ALPHA)
    samples = on_ranks.random_samples(config.vocab_size, LENGTHS)

    def settings(case, recompute=True, coefficient=COEFFICIENT, dropout=0.0, seed=42):
        return {
            "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder), "seed": seed},
            "lora": {"r": R, "alpha": ALPHA, "dropout": dropout, "target_modules": LINEAR_LAYERS},
            "data": {"topology": {
                "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
                "pipeline_parallel": case.pipeline,
            }},
            "hyperparameters": {
                "per_device_batch": case.batch, "gradient_accumulation_steps": max(1, BATCH // (case.data * case.batch)),
                "router_aux_loss_coef": coefficient, "max_steps": 3, "learning_rate": 1e-2,
                "parallelism": {"bf16": False, "activation_checkpointing": recompute},
            },
        }  # fmt: skip

    return settings, samples, of_transformers(Reference(model, adapter, ALPHA / R), samples)


def of_transformers(reference, samples):
    """One forward of all samples as a padded batch: counts, loss, balancing loss, and gradients of the losses' weighted sum.

    The last token of a sample is only a target, not an input.
    """
    config, longest = reference.model.config, max(len(ids) for ids, _ in samples) - 1
    fed, labels = torch.zeros(len(samples), longest, dtype=torch.int64), torch.full((len(samples), longest), -100)
    mask = torch.zeros_like(fed)
    for i, (ids, supervised) in enumerate(samples):
        n = len(ids) - 1
        fed[i, :n], mask[i, :n] = ids[:-1], 1
        labels[i, :n] = torch.where(supervised[1:], ids[1:], -100)
    call = {"attention_mask": mask, "output_router_logits": True, "use_cache": False}
    out = functional_call(reference.model, reference.effective(), (fed,), call)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    adapters = list(reference.adapter.values())
    without = torch.autograd.grad(loss, adapters, retain_graph=True)
    gradients = torch.autograd.grad(loss + COEFFICIENT * out.aux_loss, adapters)
    chosen = [logits[mask.flatten().bool()].topk(config.num_experts_per_tok).indices for logits in out.router_logits]
    return {
        "tokens": torch.stack([torch.bincount(c.flatten(), minlength=config.num_experts) for c in chosen]),
        "loss": loss.item(),
        "balance_loss": out.aux_loss.item(),
        "gradients": dict(zip(reference.adapter, gradients, strict=True)),
        "without": dict(zip(reference.adapter, without, strict=True)),
    }


def one_batch(settings, samples):
    """The results of `of_transformers`, for this rank."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    loss, _, parts = on_ranks.measure_gradients(trainer, len(samples))
    load = trainer.load
    return {"tokens": load.tokens, "loss": loss, "balance_loss": load.balance_loss, "gradients": parts}


@pytest.mark.parametrize(
    ("case", "recompute"), [*((case, True) for case in CASES), (CASES[1], False), (CASES[-4], False)], ids=str
)
def test_counts_balancing_loss_and_gradients_equal_those_of_transformers(ranks, world, case, recompute):
    settings, samples, want = world
    answers = ranks(case.ranks, one_batch, settings(case, recompute), samples)
    for got in answers:
        assert torch.equal(got["tokens"], want["tokens"])
        # fp32 probabilities, summed in another order.
        assert got["balance_loss"] == pytest.approx(want["balance_loss"], rel=1e-5)
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    shapes = {name: gradient.shape for name, gradient in want["gradients"].items()}
    got = on_ranks.assemble([answer["gradients"] for answer in answers], shapes)
    for name, gradient in want["gradients"].items():
        # Relative to the largest entry: fp32 sums of hundreds of terms in another order.
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, name


def test_the_balancing_loss_contributes_to_the_compared_gradients(world):
    _, _, want = world
    gates = [name for name in want["gradients"] if ".gate." in name]
    assert len(gates) == 6  # A and B in three sparse layers
    for name in gates:
        assert (want["gradients"][name] - want["without"][name]).norm() > 0.1 * want["gradients"][name].norm()


def both_counts(settings, samples):
    """This rank's counts from the counting forward and from the step's forward."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    weigh, counts = trainer.load._weights, []

    def spied(batches):
        weights = weigh(batches)
        counts.append(trainer.load.counted())
        return weights

    trainer.load._weights = spied
    for _ in range(2):
        trainer.train_step()
        counts.append(trainer.load.counted())
    return [tokens[: trainer.load.tokens.numel()] for tokens in counts]


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("case", [Case(1, batch=2), Case(4, tensor=2, pipeline=2, batch=2)], ids=str)
def test_a_step_drops_the_same_choices_as_the_counting_forward(ranks, world, case, recompute):
    settings, samples, _ = world
    for first, second, third, fourth in ranks(case.ranks, both_counts, settings(case, recompute, dropout=0.3), samples):
        assert torch.equal(first, second)
        assert torch.equal(third, fourth)
        assert not torch.equal(first, third), "with the same dropout in each step this test would say nothing"


def steps(settings, samples):
    """The records of three steps with validations between them, and how often the routers ran in each."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    _, router = next(model.routers())
    calls, forward = [], router.forward
    router.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    records = []
    for _ in range(3):
        calls.clear()
        records.append({**trainer.train_step(), "calls": len(calls), "tokens_of_experts": trainer.load.tokens.sum(1)})
        trainer.evaluate(trainer.train)
    return records


@pytest.mark.parametrize("case", [Case(1, batch=2), Case(2, expert=2, batch=2)], ids=str)
def test_a_balancing_coefficient_costs_one_forward_and_zero_costs_nothing(ranks, world, case):
    settings, samples, _ = world
    micro_batches = 8 // case.data // case.batch
    for recompute, coefficient, forwards in ((True, 0.0, 2), (False, 0.1, 2)):
        for record in ranks(case.ranks, steps, settings(case, recompute, coefficient), samples)[0]:
            assert record["calls"] == forwards * micro_batches
            assert ("balance_loss" in record) == bool(coefficient)
            # top-3 of every token fed, in each layer, however often its router ran
            assert record["tokens_of_experts"].tolist() == [3 * record["tokens"]] * 3
            assert 1.0 < record["expert_imbalance"] < record["expert_imbalance_worst"] <= 8 / 3


def test_imbalance_is_the_maximum_over_the_mean():
    tokens = torch.tensor([[4, 0, 2, 2], [3, 3, 3, 3], [0, 0, 12, 0]])
    assert imbalances(tokens).tolist() == [2.0, 1.0, 4.0]


def with_capacity(settings, samples, factor):
    """The record of a step and the counts of each layer; then a validation loss."""
    config, topology, model = on_ranks.start({**settings, "hyperparameters": settings["hyperparameters"] | {"expert_capacity_factor": factor}})  # fmt: skip
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    validated = trainer.evaluate(trainer.train)[0]
    return trainer.train_step(), trainer.load.dropped, trainer.load.tokens, validated


@pytest.mark.parametrize("case", [Case(1, batch=8), Case(2, tensor=2, batch=8), Case(2, expert=2, batch=4)], ids=str)
def test_tokens_beyond_the_capacity_are_dropped_in_training_only(ranks, world, case):
    settings, samples, want = world
    plain = settings(case, coefficient=0.0)
    free, dropped, _, validated = ranks(case.ranks, with_capacity, plain, samples, None)[0]
    assert dropped == 0
    assert "dropped" not in free
    roomy, dropped, tokens, same = ranks(case.ranks, with_capacity, plain, samples, 8.0)[0]
    assert (dropped, roomy["loss"], same) == (0, free["loss"], validated)
    assert torch.equal(tokens, want["tokens"])
    tight, dropped, tokens, same = ranks(case.ranks, with_capacity, plain, samples, 1.0)[0]
    assert torch.equal(tokens[0], want["tokens"][0]), "what is counted is what was wanted"
    if case.ranks == 1:
        # one micro batch: at most tokens * k / experts of each expert are left
        capacity = -(-int(tokens[0].sum()) // tokens.shape[1])
        assert dropped == int((tokens - capacity).clamp_min(0).sum())
    assert 0 < tight["dropped"] == dropped / int(tokens.sum()) < 0.5
    assert tight["loss"] != free["loss"]
    assert same == validated, "nothing is dropped in validation"
