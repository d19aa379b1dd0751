"""The exported adapter is the trained one, for peft and for megasft."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from megasft.adapters.model_io import save_adapter
from megasft.adapters.peft_layout import _DEFAULTS
from megasft.config.values import LINEAR_LAYERS
from tests.parity.peft_adapters import DOWN, GATE_UP, ROUTER, base_model, loaded_by_peft, logits, save_trained_by_peft
from tests.parity.reference import PREFIX, linear_shapes, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def settings_for(folder, targets, tensor=1, data=1, **topology):
    return {
        "job": {"model": str(folder / "base"), "output_dir": str(folder / "run")},
        "lora": {"r": 4, "alpha": 12.0, "dropout": 0.0, "target_modules": list(targets)},
        "data": {"topology": {"tensor_parallel": tensor, "data_parallel": data, **topology}},
        "hyperparameters": {
            "per_device_batch": 8 // data, "learning_rate": 2e-2, "lr_schedule": "constant", "max_steps": 6,
            "parallelism": {"bf16": False},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "targets",
    [LINEAR_LAYERS, ATTENTION, ("gate_proj", "q_proj"), ("down_proj",), ("gate",), ("up_proj", "gate")],
    ids="+".join,
)
@pytest.mark.parametrize("mlp_only_layers", [[], [1]], ids=["sparse", "with dense layer"])
def test_peft_loads_the_complete_exported_adapter_and_gives_the_trained_logits(
    ranks, tmp_path, targets, mlp_only_layers
):
    config = tiny_config(mlp_only_layers=mlp_only_layers)
    random_model(config).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [24] * 8)
    settings = settings_for(tmp_path, targets, tensor=2, data=2)
    ranks(4, on_ranks.loss_curve, settings, samples, 6, str(tmp_path / "adapter"))

    settings["job"]["init_adapter"] = str(tmp_path / "adapter")
    ours = ranks(4, on_ranks.logits, settings, samples)[0]
    plain = logits(base_model(tmp_path / "base"), samples)
    theirs = logits(loaded_by_peft(tmp_path / "base", tmp_path / "adapter"), samples)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 0.05, "training changed nothing that could be compared"


def test_every_target_of_every_layer_and_expert_moved(ranks, tmp_path):
    config = tiny_config()
    random_model(config).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [40] * 8)  # 320 tokens x 3 choices over 8 experts: all see tokens
    ranks(4, on_ranks.loss_curve, settings_for(tmp_path, LINEAR_LAYERS, 2, 2), samples, 3, str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(linear_shapes(config))
    for name, (n, k) in linear_shapes(config).items():
        A, B = (saved[f"{PREFIX}{name}.lora_{matrix}.weight"] for matrix in "AB")
        assert A.shape == (4, k)
        assert B.shape == (n, 4)
        assert B.any(), f"{name} was not trained"
        # PEFT's initialisation is uniform in +-1/sqrt(K); training moved it a little.
        assert 0.5 * k**-0.5 < A.abs().max() < k**-0.5 + 0.2


def test_the_adapter_does_not_depend_on_topology(ranks, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [24, 9, 17, 30, 12, 5, 21, 8])
    adapters = {}
    for tensor, data in ((1, 1), (1, 4), (2, 2), (4, 1)):
        folder = tmp_path / f"tp{tensor}dp{data}"
        ranks(
            tensor * data,
            on_ranks.loss_curve,
            settings_for(tmp_path, LINEAR_LAYERS, tensor, data),
            samples,
            4,
            str(folder),
        )
        adapters[tensor, data] = load_file(folder / "adapter_model.safetensors")
    first = adapters.pop((1, 1))
    for topology, other in adapters.items():
        assert other.keys() == first.keys()
        for name, value in first.items():
            # Adam divides by the root of tiny second moments, so rounding is magnified; after 4 steps of 2e-2.
            assert (other[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-6, (topology, name)


def test_a_saved_adapter_loads_back_bitwise(ranks, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [24] * 8)
    ranks(4, on_ranks.loss_curve, settings_for(tmp_path, LINEAR_LAYERS, 2, 2), samples, 2, str(tmp_path / "one"))
    again = settings_for(tmp_path, LINEAR_LAYERS, 1, 2)
    again["job"]["init_adapter"] = str(tmp_path / "one")
    ranks(2, on_ranks.loss_curve, again, samples, 0, str(tmp_path / "two"))
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_adapter_config_says_what_peft_and_vllm_need(ranks, tmp_path):
    random_model(tiny_config(mlp_only_layers=[])).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [24] * 8)
    ranks(
        1, on_ranks.loss_curve, settings_for(tmp_path, ("gate_proj", "q_proj")), samples, 1, str(tmp_path / "adapter")
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.0)
    assert isinstance(config["lora_alpha"], int)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    # Both take experts whole: the projections that were not trained are named, and written as zeros.
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config["target_parameters"] is None
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {name for name, value in saved.items() if value.any()}
    written = {name for name in saved if "mlp.experts" in name}
    assert len(written) == 3 * 8 * 3 * 2  # layers, experts, projections, A and B
    assert {name for name in written if "up_proj" in name or "down_proj" in name}.isdisjoint(trained)
    assert {name for name in written if "gate_proj" in name} <= trained


EXPERTS = ("gate_proj", "up_proj", "down_proj")
DENSE = [f"mlp.{name}.weight" for name in EXPERTS]
# What peft was told to train, and the [lora] settings under which a job goes on from it.
TRAINED_BY_PEFT = {
    "attention": ({"target_modules": list(ATTENTION)}, ATTENTION, 4),
    "one pair of A for gate and up": (
        {"target_modules": list(ATTENTION), "target_parameters": [GATE_UP, DOWN, ROUTER]}, LINEAR_LAYERS, 4,
    ),
    "gate and up only": ({"target_modules": [], "target_parameters": [GATE_UP]}, ("gate_proj", "up_proj"), 4),
    "down only": ({"target_modules": ["q_proj"], "target_parameters": [DOWN]}, ("q_proj", "down_proj"), 4),
    # peft doubles the rank of gate and up and then trains all of B: they share an A of rank 8, the others have 4.
    "all-linear": ({"target_modules": "all-linear"}, LINEAR_LAYERS, 8),
    "ranks by pattern": (
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 6}, "alpha_pattern": {"o_proj": 18}},
        ("q_proj", "o_proj"), 6,
    ),
    "stabilised scaling": ({"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 6}, ("q_proj",), 4),
    "dense layer": (
        {"target_modules": ["q_proj"], "target_parameters": [GATE_UP, DOWN, *DENSE]}, ("q_proj", *EXPERTS), 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED_BY_PEFT)
def test_a_job_starts_from_an_adapter_trained_with_peft(ranks, tmp_path, kind):
    peft_settings, targets, r = TRAINED_BY_PEFT[kind]
    random_model(tiny_config(mlp_only_layers=[1] if kind == "dense layer" else [])).save_pretrained(tmp_path / "base")
    save_trained_by_peft(tmp_path / "base", tmp_path / "peft", **peft_settings)
    samples = on_ranks.random_samples(203, [24] * 4)
    theirs = logits(loaded_by_peft(tmp_path / "base", tmp_path / "peft"), samples)
    plain = logits(base_model(tmp_path / "base"), samples)
    assert (theirs - plain).abs().max() > 0.05
    for topology in ({"tensor": 1}, {"tensor": 2, "data": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}):
        settings = settings_for(tmp_path, targets, **topology)
        settings["lora"] |= {"r": r, "alpha": 3.0 * r}
        settings["job"]["init_adapter"] = str(tmp_path / "peft")
        ours = ranks(1 if topology == {"tensor": 1} else 4, on_ranks.logits, settings, samples)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def save_again(settings, folder, layout):
    _, _, model = on_ranks.start(settings)
    save_adapter(model, folder, settings["job"]["model"], layout)
    return {shard.name: (shard.index, shard.local.clone()) for shard in model.adapter_shards()}


def test_widened_adapters_train_with_their_full_rank(ranks, tmp_path):
    random_model(tiny_config(mlp_only_layers=[])).save_pretrained(tmp_path / "base")
    save_trained_by_peft(tmp_path / "base", tmp_path / "peft", target_modules="all-linear")
    settings = settings_for(tmp_path, LINEAR_LAYERS)
    settings["lora"] |= {"r": 8, "alpha": 24.0}
    settings["job"]["init_adapter"] = str(tmp_path / "peft")
    parts = ranks(1, save_again, settings, str(tmp_path / "again"), "per-expert")[0]
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    widened = [name for name in parts if "self_attn" in name or ".mlp.gate." in name]
    assert len(widened) == 3 * 5 * 2  # layers; q, k, v, o and the router; A and B
    for name, (_, value) in parts.items():
        if name in widened:
            kept, added = (value[:4], value[4:]) if "lora_A" in name else (value[:, :4], value[:, 4:])
            assert torch.equal(kept, theirs[PREFIX + name])
            assert added.any() == ("lora_A" in name), f"{name}: with A and B both zero nothing would ever train"


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("gate_proj", "q_proj"), ("down_proj",), ATTENTION], ids="+".join)
@pytest.mark.parametrize("mlp_only_layers", [[], [1]], ids=["sparse", "with dense layer"])
def test_a_fused_export_round_trips_through_peft_bitwise(ranks, tmp_path, targets, mlp_only_layers):
    config = tiny_config(mlp_only_layers=mlp_only_layers)
    random_model(config).save_pretrained(tmp_path / "base")
    start = write_adapter(random_adapter(config, 4, frozenset(targets)), tmp_path / "start", 4, 12)
    samples = on_ranks.random_samples(203, [24] * 4)
    four = settings_for(tmp_path, targets, tensor=2, data=2, expert_parallel=4)
    four["job"]["init_adapter"] = str(start)
    ranks(4, save_again, four, str(tmp_path / "fused"), "fused")
    ours = ranks(4, on_ranks.logits, four, samples)[0]

    peft = loaded_by_peft(tmp_path / "base", tmp_path / "fused")
    torch.testing.assert_close(ours, logits(peft, samples), rtol=1e-5, atol=1e-5)
    assert (ours - logits(base_model(tmp_path / "base"), samples)).abs().max() > 0.05
    peft.save_pretrained(tmp_path / "by peft")

    two = settings_for(tmp_path, targets, tensor=1, data=2)
    two["job"]["init_adapter"] = str(tmp_path / "by peft")
    ranks(2, save_again, two, str(tmp_path / "end"), "per-expert")
    was, now = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("start", "end"))
    assert was.keys() <= now.keys()
    assert all(torch.equal(now[name], was[name]) if name in was else not now[name].any() for name in now)


def test_the_fused_layout_equals_what_peft_converts_the_other_to(ranks, tmp_path):
    config = tiny_config(mlp_only_layers=[])
    random_model(config).save_pretrained(tmp_path / "base")
    settings = settings_for(tmp_path, LINEAR_LAYERS, tensor=2)
    settings["job"]["init_adapter"] = str(
        write_adapter(random_adapter(config, 4, frozenset(LINEAR_LAYERS)), tmp_path / "start", 4, 12)
    )
    for layout in ("per-expert", "fused"):
        ranks(2, save_again, settings, str(tmp_path / layout), layout)
    loaded_by_peft(tmp_path / "base", tmp_path / "per-expert").save_pretrained(tmp_path / "by peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fused", "by peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_config_starts_from_the_defaults_of_peft():
    assert LoraConfig().to_dict() == _DEFAULTS
