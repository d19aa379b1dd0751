"""Adapter files that peft loads and that are not as megasft writes them: equal logits, or a line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft.adapters.adapter_file import AdapterFile
from megasft.adapters.export import export_adapter
from megasft.adapters.fit import fitting_pairs, warn_of_other_base
from megasft.adapters.merge import merge_adapter
from megasft.config.schema import LoraSettings
from megasft.messages import UserError, warn
from megasft.model.hf_config import read_config
from tests.parity.peft_adapters import base_model, loaded_by_peft, logits
from tests.parity.reference import random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

SAMPLES = on_ranks.random_samples(203, [24, 9])
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj"})
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "base"
    random_model(tiny_config(mlp_only_layers=[])).save_pretrained(folder)
    return folder


def write(folder: Path, targets: frozenset[str], keep=lambda name: True, base: str = "", **config) -> Path:
    adapter = random_adapter(tiny_config(mlp_only_layers=[]), 4, targets)
    write_adapter({name: value for name, value in adapter.items() if keep(name)}, folder, 4, 12)
    content = json.loads((folder / CONFIG).read_text()) | {"target_modules": sorted(targets)}
    (folder / CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": base} | config))
    return folder


def our_logits(ranks, base: Path, adapter: Path) -> torch.Tensor:
    """With the settings that `megasft generate` takes from the adapter."""
    lora = AdapterFile(adapter).settings()
    settings = {
        "job": {"model": str(base), "init_adapter": str(adapter)},
        "lora": {"r": lora.r, "alpha": lora.alpha, "dropout": 0.0, "target_modules": list(lora.target_modules)},
        "hyperparameters": {"parallelism": {"bf16": False}},
    }
    return ranks(1, on_ranks.logits, settings, SAMPLES)[0]


def merged_logits(base: Path, adapter: Path, out: Path) -> torch.Tensor:
    merge_adapter(base, adapter, out)
    return logits(base_model(out), SAMPLES)


def assert_changed(base: Path, found: torch.Tensor) -> None:
    assert (found - logits(base_model(base), SAMPLES)).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_experts_without_an_adapter_are_exported_as_zeros_that_peft_loads(tmp_path, base, layout):
    missing = (".experts.2.", ".experts.6.", ".experts.7.", "layers.1.mlp.experts.3.")
    adapter = write(tmp_path / "some", EXPERTS, lambda name: not any(part in name for part in missing), str(base))
    whole = write(tmp_path / "whole", EXPERTS, base=str(base))  # the same adapter, with zeros for those experts
    tensors = load_file(whole / WEIGHTS)
    for name in tensors:
        if any(part in name for part in missing):
            tensors[name].zero_()
    save_file(tensors, whole / WEIGHTS)
    export_adapter(adapter, tmp_path / "out", layout)
    found = logits(loaded_by_peft(base, tmp_path / "out"), SAMPLES)
    torch.testing.assert_close(found, merged_logits(base, whole, tmp_path / "merged"), rtol=1e-5, atol=1e-5)
    assert_changed(base, found)


def test_without_the_base_an_export_says_what_number_of_experts_it_took(tmp_path, capsys):
    warn.cache_clear()
    adapter = write(tmp_path / "some", EXPERTS, lambda name: ".experts.7." not in name, "/gone/base")
    export_adapter(adapter, tmp_path / "out", "fused")
    said = capsys.readouterr().err
    assert "'/gone/base' is not on this machine" in said
    assert "more than the 7 experts of the adapter, name the base with --model" in said


def test_an_export_of_more_experts_than_the_base_has_is_refused(tmp_path, base):
    small = shutil.copytree(base, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"num_local_experts": 6}))
    with pytest.raises(UserError, match=r"adapts 8 experts of a layer, but those of .*small have 6"):
        export_adapter(write(tmp_path / "a", EXPERTS), tmp_path / "out", "fused", str(small))
    assert not (tmp_path / "out").exists()


def as_fp8(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def test_fp8_adapters_are_read_as_peft_reads_them(ranks, tmp_path, base):
    adapter = as_fp8(write(tmp_path / "fp8", ATTENTION, base=str(base)))
    want = logits(loaded_by_peft(base, adapter), SAMPLES)
    torch.testing.assert_close(our_logits(ranks, base, adapter), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_logits(base, adapter, tmp_path / "merged"), want, rtol=1e-5, atol=1e-5)
    export_adapter(adapter, tmp_path / "out", "per-expert")
    found, stored = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", adapter))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in stored.items())
    assert_changed(base, want)


def test_a_fused_fp8_adapter_is_split_as_a_wider_one(tmp_path, base):
    export_adapter(write(tmp_path / "plain", EXPERTS), tmp_path / "fused", "fused", str(base))
    adapter = AdapterFile(as_fp8(tmp_path / "fused"))
    assert adapter.splits()
    export_adapter(tmp_path / "fused", tmp_path / "out", "per-expert")
    assert len(load_file(tmp_path / "out" / WEIGHTS)) == 3 * 8 * 3 * 2


def test_an_fp8_adapter_with_nan_is_refused(tmp_path):
    adapter = as_fp8(write(tmp_path / "fp8", ATTENTION))
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values())).view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError, match="holds values that are not finite"):
        export_adapter(adapter, tmp_path / "out")


# What peft lets a configuration say of rank and alpha by module; the tensors all have rank 4.
SCALINGS = {
    "one alpha of its own": {"alpha_pattern": {"q_proj": 48}},
    "each its own": {"alpha_pattern": {"q_proj": 48, "v_proj": 5, "layers.1.self_attn.o_proj": 7}},
    "rank and alpha": {"r": 8, "rank_pattern": {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4},
                       "alpha_pattern": {"k_proj": 6}},
    "rslora": {"use_rslora": True, "alpha_pattern": {"o_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_alpha_by_pattern_is_read_as_peft_reads_it(ranks, tmp_path, base, kind):
    adapter = write(tmp_path / "adapter", ATTENTION, base=str(base), **SCALINGS[kind])
    want = logits(loaded_by_peft(base, adapter), SAMPLES)
    torch.testing.assert_close(our_logits(ranks, base, adapter), want, rtol=1e-5, atol=1e-5)
    export_adapter(adapter, tmp_path / "out", "per-expert")
    found = logits(loaded_by_peft(base, tmp_path / "out"), SAMPLES)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert_changed(base, want)


def test_the_alpha_that_is_asked_for_is_accepted(tmp_path, base):
    adapter = AdapterFile(write(tmp_path / "adapter", ATTENTION, **SCALINGS["each its own"]))
    wrong = LoraSettings(r=4, alpha=48, target_modules=tuple(ATTENTION))
    with pytest.raises(UserError, match=r"set \[lora\] alpha = 12 to continue") as error:
        fitting_pairs(adapter, wrong, read_config(base))
    assert "scales k_proj by 3, but [lora] alpha = 48 by 12" in str(error.value)
    fitting_pairs(adapter, wrong.model_copy(update={"alpha": 12.0}), read_config(base))


def test_an_adapter_of_another_base_is_named_with_both(tmp_path, base, capsys):
    config = tiny_config(mlp_only_layers=[])
    random_model(config, seed=7).save_pretrained(tmp_path / "other" / "base")  # the same last name and the same shapes
    moved = shutil.copytree(base, tmp_path / "moved" / "renamed")

    capsys.readouterr()

    def said(named: str, model: Path | str) -> str:
        warn.cache_clear()
        warn_of_other_base(AdapterFile(write(tmp_path / "adapter", ATTENTION, base=named)), str(model))
        return capsys.readouterr().err

    for named, model in (
        (str(base), base), ("", base), (str(base), moved), (str(moved), base), ("/gone/base", base), ("/gone/base/", base),
        ("someone/Base", base), ("/gone/models--Owner--Base/snapshots/0123abc", base), (str(base), f"{base}/../base"),
    ):  # fmt: skip
        assert not said(named, model), (named, model)
    for named, model in (
        (str(base), tmp_path / "other" / "base"), ("/gone/other", base), ("someone/other", base), (str(tmp_path), base),
    ):  # fmt: skip
        line = said(named, model)
        assert f"names the base model {named!r}, and is used with {str(model)!r}" in line
        assert line.count("\n") == 1
