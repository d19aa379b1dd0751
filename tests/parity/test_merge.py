"""A merged checkpoint is a model folder like its base, and gives the logits of base plus adapter."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft import cli
from megasft.adapters.export import export_adapter
from megasft.adapters.merge import merge_adapter, parse_size
from megasft.config.values import LINEAR_LAYERS
from tests.parity.peft_adapters import DOWN, GATE_UP, ROUTER, base_model, loaded_by_peft, logits, save_trained_by_peft
from tests.parity.reference import random_adapter, random_model, tiny_config, write_adapter
from tests.support.on_ranks import random_samples

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
SAMPLES = random_samples(203, [24] * 4)


def write_base(folder: Path, experts: str = "per-expert", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Experts in the layout of hub checkpoints, or as transformers 5 holds them in memory."""
    model = random_model(tiny_config(**{"mlp_only_layers": [], **changes})).to(dtype)
    model.save_pretrained(folder)
    if experts == "fused":
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("The base.")
    return folder


def write_peft_adapter(base: Path, folder: Path, kind: str) -> Path:
    config = tiny_config(mlp_only_layers=[])
    if kind == "trained by peft":
        targets = [GATE_UP, DOWN, ROUTER]
        save_trained_by_peft(base, folder, target_modules=["q_proj"], target_parameters=targets)
    elif kind == "all-linear of peft":
        save_trained_by_peft(base, folder, target_modules="all-linear")
    else:
        targets = ATTENTION if kind == "attention" else frozenset(LINEAR_LAYERS)
        write_adapter(random_adapter(config, 4, targets), folder / "plain", 4, 12)
        export_adapter(folder / "plain", folder / "out", "fused" if kind == "fused" else "per-expert", str(base))
        folder /= "out"
    return folder


@pytest.mark.parametrize("kind", ["per-expert", "fused", "attention", "trained by peft", "all-linear of peft"])
@pytest.mark.parametrize("experts", ["per-expert", "fused"])
def test_merged_fp32_logits_equal_the_adapters(tmp_path, experts, kind):
    base = write_base(tmp_path / "base", experts)
    adapter = write_peft_adapter(base, tmp_path / "adapter", kind)
    merge_adapter(base, adapter, tmp_path / "merged", max_shard_bytes=200_000)
    want, plain = logits(loaded_by_peft(base, adapter), SAMPLES), logits(base_model(base), SAMPLES)
    torch.testing.assert_close(logits(base_model(tmp_path / "merged"), SAMPLES), want, rtol=1e-5, atol=1e-5)
    assert (want - plain).abs().max() > 0.05

    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    before = load_file(base / "model.safetensors")
    assert index["weight_map"].keys() == before.keys(), "experts left the layout of the base"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())


def test_merged_bf16_weights_are_rounded_once_and_logits_follow(tmp_path):
    # All experts of a token are taken, so that rounding cannot change which.
    base = write_base(tmp_path / "base", dtype=torch.bfloat16, num_experts_per_tok=8)
    adapter = write_peft_adapter(base, tmp_path / "adapter", "per-expert")
    merge_adapter(base, adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        assert after[name].dtype == torch.bfloat16
        if f"{stem}.lora_A.weight" not in tensors:
            assert torch.equal(after[name], weight)
            continue
        A, B = (tensors[f"{stem}.lora_{matrix}.weight"].double() for matrix in "AB")
        exact = weight.double() + 3 * B @ A
        # bf16 has 8 significant bits: rounding to nearest moves a number by at most 2^-8 of it. The sum in fp32 adds no
        # more than a few times 2^-24 of its terms.
        error = (after[name].double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 2**-20 * weight.abs().max()).all(), name
    # Each of the 3 layers has 4 products in a row (qkv, o, gate and up, down) and a router, whose weights are off by up
    # to 2^-8 each. Were all those errors to point the same way, the logits would be off by 3 x 5 x 2^-8 = 6%; they are
    # independent, so it is far less.
    want = logits(loaded_by_peft(base, adapter), SAMPLES)
    error = logits(base_model(tmp_path / "merged"), SAMPLES) - want
    assert 0 < error.norm() < 15 * 2**-8 * want.norm()


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_all_weights_and_the_config_have_the_requested_dtype(tmp_path, dtype, stored):
    base = write_base(tmp_path / "base", dtype=torch.float32 if dtype == "bf16" else torch.bfloat16)
    adapter = write_peft_adapter(base, tmp_path / "adapter", "attention")
    merge_adapter(base, adapter, tmp_path / "merged", dtype)
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {stored}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")


def test_the_merged_folder_has_all_files_of_the_base_except_its_model_card(tmp_path):
    base = write_base(tmp_path / "base")
    merge_adapter(base, write_peft_adapter(base, tmp_path / "adapter", "attention"), tmp_path / "merged")
    names = {path.name for path in base.iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_tensors_larger_than_a_piece_are_merged_the_same(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "fused")
    adapter = write_peft_adapter(base, tmp_path / "adapter", "fused")
    merge_adapter(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("megasft.adapters.merge.PIECE_BYTES", 5 * 64 * 4)  # 5 rows: no matrix divides
    monkeypatch.setattr("megasft.adapters.merge.RELEASE_BYTES", 1)
    merge_adapter(base, adapter, tmp_path / "pieces")
    whole, pieces = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-6, atol=1e-7)  # GEMMs of other shapes round otherwise


def test_merge_by_command_finds_the_base_that_the_adapter_names(tmp_path, monkeypatch, capsys):
    base = write_base(tmp_path / "base")
    adapter = write_peft_adapter(base, tmp_path / "adapter", "fused")
    out = tmp_path / "merged"
    out.mkdir()  # an empty folder is as good as none
    command = ["megasft", "merge", str(adapter), str(out), "--max-shard-size", "300KB"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert all(path.stat().st_size < 310_000 for path in files)
    assert f"{len(files)} file(s)" in capsys.readouterr().out


class StoppedError(Exception):
    pass


def test_an_interrupted_merge_leaves_no_files(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_peft_adapter(base, tmp_path / "adapter", "attention")

    def stop(done, total):
        raise StoppedError

    with pytest.raises(StoppedError):
        merge_adapter(base, adapter, tmp_path / "new" / "merged", progress=stop)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700kb", 700_000), ("12B", 12)]
)
def test_sizes_are_parsed_with_their_units(text, size):
    assert parse_size(text) == size
