"""The tiny model on the device against transformers on the CPU, and the same under every topology that fits here."""

import torch

from megasft.config.values import LINEAR_LAYERS
from tests.gpu.place import Place
from tests.parallel.invariance import Case, Experiment
from tests.parallel.step_traffic import measured_and_expected
from tests.parity import quantized
from tests.parity.reference import Reference, linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA = 4, 12.0
LENGTHS = [19, 7, 30, 4, 23, 16]
# fp32 sums in another order: 9e-7 of the gradients' norm on CPUs. In bf16 each layer rounds to 8 bits, and tokens with close
# router scores choose other experts: 0.049 on CPUs.
BOUNDS = {"fp32": {"loss": 1e-5, "gradients": 1e-5}, "bf16": {"loss": 5e-3, "gradients": 0.1}}


def _against_transformers(place: Place, **changes: object) -> None:
    config = tiny_config(**changes)
    model, adapter = random_model(config), random_adapter(config, R, frozenset(LINEAR_LAYERS))
    model.save_pretrained(place.folder / "base")
    write_adapter(adapter, place.folder / "adapter", R, ALPHA)
    samples = on_ranks.random_samples(config.vocab_size, LENGTHS)
    reference = Reference(model, adapter, ALPHA / R)
    loss = reference.loss(samples)
    want = dict(zip(reference.adapter, torch.autograd.grad(loss, list(reference.adapter.values())), strict=True))
    shapes = {f"{n}.lora_A.weight": (R, k) for n, (_, k) in linear_shapes(config).items()}
    shapes |= {f"{n}.lora_B.weight": (out, R) for n, (out, _) in linear_shapes(config).items()}
    norm = sum(float(g.square().sum()) for g in want.values()) ** 0.5
    for dtype, bounds in BOUNDS.items():
        settings = _settings(place) | {
            "hyperparameters": {"per_device_batch": 6, "parallelism": {"bf16": dtype == "bf16"}}
        }
        ((got, _, parts),) = place.pool()(1, on_ranks.gradients, settings, samples)
        place.at_most(f"{dtype}: loss, relative", abs(got / float(loss) - 1), bounds["loss"])
        ours = on_ranks.assemble([parts], shapes)
        error = sum(float((ours[name] - g).square().sum()) for name, g in want.items()) ** 0.5
        place.at_most(f"{dtype}: {len(want)} gradients, norm of the error of theirs", error / norm, bounds["gradients"])


def _settings(place: Place) -> dict:
    return {
        "job": {"model": str(place.folder / "base"), "init_adapter": str(place.folder / "adapter"), "output_dir": str(place.folder)},
        "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": LINEAR_LAYERS},
    }  # fmt: skip


def layer(place: Place) -> None:
    """One layer with experts, forward and backward."""
    _against_transformers(place, num_hidden_layers=1, mlp_only_layers=[])


def model(place: Place) -> None:
    """Three layers, one of them dense."""
    _against_transformers(place)


CASES = [
    Case(2, tensor=2, expert_tensor=2), Case(2, tensor=2), Case(2, tensor=2, expert=2), Case(2, expert=2), Case(2),
    Case(2, pipeline=2, batch=2), Case(4, tensor=2, expert_tensor=2), Case(4, tensor=2, expert=2, batch=2),
]  # fmt: skip


def topologies(place: Place) -> None:
    """Loss, gradients with dropout, a 3-step curve and the adapter it ends in, relative to one rank."""
    place.need(2)
    experiment = Experiment(place.folder, place.pool())
    for case in CASES:
        if case.ranks <= place.ranks:
            for what, difference in experiment.differences(case).items():
                place.at_most(f"{case}: {what}", difference, 1e-5 if what != "adapter" else 1e-4)


def collectives(place: Place) -> None:
    """Values of the collectives a step uses, by formula: rank i contributes i + 1."""
    place.need(2)
    n = place.ranks
    for rank, found in enumerate(place.pool()(n, collective_values)):
        total = n * (n + 1) / 2
        want = {
            "all-reduce": [total],
            "all-gather": [float(i + 1) for i in range(n)],
            "reduce-scatter": [total],
            "broadcast": [1.0],
        }
        want |= {"all-to-all": [100.0 * (i + 1) + rank for i in range(n)], "object": [float(i) for i in range(n)]}
        place.equal(f"rank {rank} of {n}", found, want)


def collective_values() -> dict[str, list[float]]:
    """On a rank: what it gets from each collective."""
    import torch.distributed as dist

    from megasft import host

    device, n, rank = host.device(), dist.get_world_size(), dist.get_rank()
    mine = torch.full((1,), rank + 1.0, device=device)
    summed, first = mine.clone(), mine.clone()
    dist.all_reduce(summed)
    dist.broadcast(first, 0)
    gathered, scattered, exchanged = mine.new_empty(n), mine.new_empty(1), mine.new_empty(n)
    dist.all_gather_into_tensor(gathered, mine)
    dist.reduce_scatter_tensor(scattered, mine.repeat(n))
    dist.all_to_all_single(exchanged, 100 * (rank + 1) + torch.arange(n, device=device, dtype=torch.float32))
    objects: list = [None] * n
    dist.all_gather_object(objects, float(rank))
    kinds = {
        "all-reduce": summed,
        "all-gather": gathered,
        "reduce-scatter": scattered,
        "broadcast": first,
        "all-to-all": exchanged,
    }
    return {name: value.tolist() for name, value in kinds.items()} | {"object": objects}


def traffic(place: Place) -> None:
    """Calls and bytes of all collectives of a step, by the formulas of a layer without adapters, on rank 0."""
    place.need(2)
    random_model(tiny_config(num_hidden_layers=4)).save_pretrained(place.folder / "base")
    for case in (Case(2, tensor=2, expert_tensor=2), Case(4, tensor=2, expert_tensor=2, batch=2)):
        if case.ranks > place.ranks:
            continue
        settings = {
            "job": {"model": str(place.folder / "base"), "output_dir": str(place.folder)},
            "lora": {"r": R, "dropout": 0.0, "target_modules": ["all-linear", "gate"]},
            "data": {"topology": {"tensor_parallel": case.tensor, "expert_tensor_parallel": case.expert_tensor}},
            "hyperparameters": {
                "per_device_batch": case.batch, "gradient_accumulation_steps": 4 // (case.data * case.batch), "max_steps": 5,
                "parallelism": {"bf16": False},
            },
        }  # fmt: skip
        samples = on_ranks.random_samples(203, [19, 7, 30, 11, 4, 23, 16, 9])
        (calls, sizes), (wanted_calls, wanted_sizes) = place.pool()(
            case.ranks, measured_and_expected, settings, samples
        )[0]
        place.equal(f"{case}: calls", sum(calls.values()), sum(wanted_calls.values()))
        place.note(f"{case}: calls and bytes of each group and kind", "as below" if sizes == wanted_sizes else dict(sizes),
                   "by formula", calls == wanted_calls and sizes == wanted_sizes)  # fmt: skip


def qlora(place: Place) -> None:
    """Every weight of a 4-bit model on the device, bit for bit those that bitsandbytes makes on the CPU."""
    settings, base, _ = quantized.make(place.folder)
    (parts,) = place.pool()(1, on_ranks.dequantized, settings)
    names = quantized.linears(base)
    differ = sum(not torch.equal(parts[name][1].float(), matrix) for name, matrix in names.items())
    place.note(f"{len(names)} matrices", f"{differ} differ", "0", differ == 0 and parts.keys() == names.keys())
