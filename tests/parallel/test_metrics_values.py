"""What a step records is right and does not depend on the topology: accuracy, padding, norms of A and B, FLOPs, seconds."""

import math
from collections import defaultdict

import pytest

from megasft.config.values import LINEAR_LAYERS
from megasft.storage.shards import leaf
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parity.reference import Reference, linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA, DECAY, STEPS = 4, 12.0, 0.1, 2
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
FED = sum(LENGTHS) - len(LENGTHS)
CASES = [
    Case(1, batch=4), Case(2), Case(2, tensor=2), Case(2, tensor=2, expert_tensor=2), Case(2, expert=2, batch=2), Case(2, pipeline=2),
    Case(4, tensor=2, expert=2), Case(4, tensor=4, expert=2, expert_tensor=2, batch=4), Case(4, tensor=2, pipeline=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(settings of a case, samples, the accuracy of transformers' logits before the first step, shapes of the factors)."""
    config, folder = tiny_config(num_hidden_layers=4), tmp_path_factory.mktemp("model")
    model, adapter = random_model(config), random_adapter(config, R, frozenset(LINEAR_LAYERS))
    model.save_pretrained(folder / "base")
    write_adapter(adapter, folder / "adapter", R, ALPHA)
    samples = on_ranks.random_samples(config.vocab_size, LENGTHS)
    reference, right, supervised = Reference(model, adapter, ALPHA / R), 0, 0
    for i, (ids, mask) in enumerate(samples):
        best = reference.logits(ids[:-1]).argmax(-1)
        if i % 2:  # the last token is only a target: some of the targets are predicted right
            ids[-1], mask[-1] = best[-1], True
        right, supervised = right + int((best == ids[1:])[mask[1:]].sum()), supervised + int(mask[1:].sum())
    shapes = {}
    for name, (n, k) in linear_shapes(config).items():
        shapes |= {f"{name}.lora_A.weight": (R, k), f"{name}.lora_B.weight": (n, R)}

    def settings(case):
        return {
            "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter"), "output_dir": str(folder)},
            "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": LINEAR_LAYERS},
            "data": {"topology": {
                "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
                "pipeline_parallel": case.pipeline,
            }},
            "hyperparameters": {
                "per_device_batch": case.batch, "gradient_accumulation_steps": 8 // (case.data * case.batch), "max_steps": 9,
                "learning_rate": 1e-2, "weight_decay": DECAY, "parallelism": {"bf16": False}, "n_epochs": 9,
            },
        }  # fmt: skip

    return settings, samples, right / supervised, supervised, shapes, config


def steps(settings, samples):
    """On a rank: the records of two steps and of a validation, lines of kind `norms`, and the adapter before and after."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    lines, weights, fed = [], [on_ranks.adapter_parts(model)], []
    trainer.log.record = lambda kind, step, **values: lines.append((kind, values)) if kind != "event" else None
    trainer.observer._monitor.sample()
    for _ in range(STEPS):
        fed.append(0)
        compute = trainer._compute

        def counted(batches, training, compute=compute):
            fed[-1] = sum(len(batch.tokens) for batch in batches)
            return compute(batches, training)

        trainer._compute = counted
        trainer.train_step()
        trainer._compute = compute
        weights.append(on_ranks.adapter_parts(model))
    counts = fed[0] if topology.groups.tp.rank() == topology.groups.pp.rank() == 0 else 0
    return lines, weights, counts, trainer.evaluate(trainer.train)


def flops_by_hand(config, lengths, supervised):
    """Of a step on conversations of these lengths: 4 per frozen weight and token, 6 per LoRA weight, half a square."""
    tokens, frozen, lora = sum(lengths), 0.0, 0.0
    for name, (n, k) in linear_shapes(config).items():
        met = config.num_experts_per_tok / config.num_experts if "experts." in name else 1
        frozen, lora = frozen + met * n * k, lora + met * R * (n + k)
    scores = sum(length**2 for length in lengths) / 2 * config.num_attention_heads * config.head_dim
    head = config.vocab_size * config.hidden_size * supervised
    return 4 * tokens * frozen + 6 * tokens * lora + 12 * config.num_hidden_layers * scores + 4 * head


def norms_by_hand(tensors):
    sums = defaultdict(float)
    for name, value in tensors.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        sums[factor, leaf(layer)] += float(value.double().square().sum())
    return {key: math.sqrt(value) for key, value in sums.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_equal_those_by_hand_under_every_topology(ranks, world, case):
    settings, samples, accuracy, supervised, shapes, _ = world
    answers = ranks(case.ranks, steps, settings(case), samples)
    lines = answers[0][0]
    assert all([kind for kind, _ in found] == ["train", "norms", "devices", "train", "norms"] for found, *_ in answers)
    (first, _), norms = (
        [values for kind, values in lines if kind == "train"],
        [v for kind, v in lines if kind == "norms"],
    )
    assert 0.05 < first["token_accuracy"] == accuracy < 0.9
    assert first["supervised_tokens"] == supervised
    assert first["tokens"] == FED
    fed = sum(answer[2] for answer in answers)
    assert first["padding_share"] == pytest.approx(1 - FED / fed, abs=1e-12)
    assert (fed > FED) == (case.tensor > 1), "rows are padded for sequence parallel only"
    weights = [on_ranks.assemble([answer[1][i] for answer in answers], shapes) for i in range(STEPS + 1)]
    for i, found in enumerate(norms):
        after = norms_by_hand(weights[i + 1])
        updates = norms_by_hand({name: weights[i + 1][name] - weights[i][name] for name in shapes})
        assert {(f, k) for f, kinds in found["parameters"].items() for k in kinds} == after.keys()
        for (factor, kind), norm in after.items():
            assert found["parameters"][factor][kind] == pytest.approx(norm, rel=1e-6)
            # By hand it is a difference of fp32 weights, each rounded to 6e-8 of them; updates are 1e-2 of them.
            assert found["updates"][factor][kind] == pytest.approx(updates[factor, kind], rel=1e-4)
    devices = next(values for kind, values in lines if kind == "devices")
    assert len(devices["busy_seconds"]) == len(devices["cpu_percent"]) == case.ranks
    assert answers[0][3].accuracy == answers[-1][3].accuracy
    for values in (values for kind, values in lines if kind == "train"):
        parts = [values[name] for name in ("data_wait", "compute_seconds", "reduce_seconds", "optimizer_seconds")]
        assert min(parts) > 0
        if case.ranks == 1:
            assert 0.9 * values["seconds"] < sum(parts) <= values["seconds"]
        assert values["tokens_per_second"] == pytest.approx(case.ranks * values["tokens_per_second_per_device"])


UNEVEN = [Case(1), Case(2), Case(2, tensor=2, batch=2), Case(2, pipeline=2), Case(4, expert=2)]


def an_epoch(settings, samples):
    """On a rank: `train` lines of an epoch with a validation before each step, the samples of each step, tokens fed."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    lines, chosen, fed = [], [], []
    trainer.log.record = lambda kind, step, **values: lines.append(values) if kind == "train" else None
    stepped = trainer.observer.stepped

    def kept(taken):
        chosen.append(taken.batch.samples.tolist())
        fed.append(sum(len(batch.tokens) for batch in taken.batch.micro_batches))
        return stepped(taken)

    trainer.observer.stepped = kept
    for _ in range(trainer.batches.steps_in(0)):
        trainer.evaluate(trainer.train)
        trainer.train_step()
    counts = topology.groups.tp.rank() == topology.groups.pp.rank() == 0
    return lines, chosen, fed if counts else [0] * len(fed)


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_a_last_global_batch_with_fewer_conversations_is_counted_as_it_is(ranks, world, case, packing):
    settings, samples, *_, config = world
    job = settings(case)
    job["hyperparameters"] |= {
        "gradient_accumulation_steps": 4 // (case.data * case.batch), "sequence_length": 35, "learning_rate": 1e-9,
    }  # fmt: skip
    job["data"]["packing"] = packing
    answers = ranks(case.ranks, an_epoch, job, samples[:7])
    lines, chosen, _ = answers[0]
    assert sorted(number for numbers in chosen for number in numbers) == list(range(7))
    if not packing:
        assert [len(numbers) for numbers in chosen] == [4, 3]
    trained = 0
    for i, (line, numbers) in enumerate(zip(lines, chosen, strict=True)):
        lengths = [len(samples[number][0]) - 1 for number in numbers]
        supervised = sum(int(samples[number][1][1:].sum()) for number in numbers)
        trained += sum(lengths)
        assert (line["tokens"], line["trained_tokens"]) == (sum(lengths), trained)
        assert line["supervised_tokens"] == supervised
        fed = sum(answer[2][i] for answer in answers)
        assert line["padding_share"] == pytest.approx(1 - sum(lengths) / fed, abs=1e-12)
        rate = flops_by_hand(config, lengths, supervised) / line["seconds"] / case.ranks
        assert line["model_flops_per_second"] == pytest.approx(rate, rel=1e-9)
        assert line["tokens_per_second"] == pytest.approx(sum(lengths) / line["seconds"])
        right = line["token_accuracy"] * supervised
        assert right == pytest.approx(round(right), abs=1e-6)
