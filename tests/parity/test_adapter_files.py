"""What is exported is what was trained, to peft and to ourselves."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from megasft.config import LINEAR_LAYERS
from tests import on_ranks
from tests.parity.reference import PREFIX, linear_shapes, random_model, tiny_config

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


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ATTENTION, ("gate_proj", "q_proj"), ("down_proj",), ("gate",), ("up_proj", "gate")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("mlp_only_layers", [[], [1]], ids=["sparse", "with dense layer"])
def test_peft_loads_the_exported_adapter_whole_and_gives_the_trained_logits(ranks, tmp_path, targets, mlp_only_layers):
    config = tiny_config(mlp_only_layers=mlp_only_layers)
    random_model(config).save_pretrained(tmp_path / "base")
    samples = on_ranks.random_samples(203, [24] * 8)
    settings = settings_for(tmp_path, targets, tensor=2, data=2)
    ranks(4, on_ranks.loss_curve, settings, samples, 6, str(tmp_path / "adapter"))

    settings["job"]["init_adapter"] = str(tmp_path / "adapter")
    ours = ranks(4, on_ranks.logits, settings, samples)[0]
    base = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = torch.cat([base(ids[None]).logits[0] for ids, _ in samples]).detach()
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    result = peft.load_adapter(tmp_path / "adapter", "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    with torch.no_grad():
        theirs = torch.cat([peft(ids[None]).logits[0] for ids, _ in samples])
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
        ranks(tensor * data, on_ranks.loss_curve, settings_for(tmp_path, LINEAR_LAYERS, tensor, data), samples, 4, str(folder))
        adapters[tensor, data] = load_file(folder / "adapter_model.safetensors")
    first = adapters.pop((1, 1))
    for topology, other in adapters.items():
        assert other.keys() == first.keys()
        for name, value in first.items():
            # Adam divides by the root of tiny second moments, so rounding is magnified; after 4 steps of 2e-2.
            assert (other[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-6, (topology, name)


def test_a_saved_adapter_loads_back_bit_for_bit(ranks, tmp_path):
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
    ranks(1, on_ranks.loss_curve, settings_for(tmp_path, ("gate_proj", "q_proj")), samples, 1, str(tmp_path / "adapter"))
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
    assert not any(value.any() for name, value in saved.items() if "up_proj" in name or "down_proj" in name)
