"""Checkpoints that are not what config.json or the hub's files look like: as transformers reads them, or refused by name."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Qwen3MoeForCausalLM

from megasft.adapters.merge import merge_adapter
from megasft.config.schema import QuantSettings
from megasft.messages import UserError
from megasft.model.hf_checkpoint import Checkpoint
from megasft.model.hf_config import read_config
from megasft.model.quantized_base import QuantizedCheckpoint, _matrix_name, prepare, quantized_layers
from megasft.storage.safetensors import all_finite
from tests.parity.peft_adapters import base_model, logits
from tests.parity.reference import Reference, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

SAMPLES = on_ranks.random_samples(203, [24, 9])


def settings_for(base: Path, tensor: int = 1, pipeline: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "job": {"model": str(base)},
        "lora": {"target_modules": ["q_proj"]},  # fresh: B is zero, so the base's logits do not change
        "data": {"topology": {"tensor_parallel": tensor, "pipeline_parallel": pipeline}},
        "hyperparameters": {"parallelism": {"bf16": False}},
        **more,
    }


def outcome(settings: dict[str, Any]) -> tuple[torch.Tensor | str, str]:
    """The logits, or the text of the UserError; and what the rank said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            found: torch.Tensor | str = on_ranks.logits(settings, SAMPLES)
        except UserError as error:
            found = str(error)
    return found, said.getvalue()


def edit(base: Path, **changes: Any) -> Path:
    """Change config.json."""
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return base


def edit_weights(base: Path, change: Any) -> Path:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def save(folder: Path, **changes: Any) -> Path:
    random_model(tiny_config(**changes)).save_pretrained(folder)
    return folder


def test_a_head_that_differs_is_not_tied_as_in_transformers(ranks, tmp_path):
    base = edit(save(tmp_path / "base"), tie_word_embeddings=True)
    want = logits(base_model(base), SAMPLES)
    (found, said), _ = ranks(2, outcome, settings_for(base, tensor=2))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert said.count("tie_word_embeddings = true in config.json, but 'lm_head.weight' differs") == 1


def test_the_head_of_a_last_stage_is_not_tied_either(ranks, tmp_path):
    base = edit(save(tmp_path / "base"), tie_word_embeddings=True)
    settings = settings_for(base, pipeline=3)
    settings["hyperparameters"]["per_device_batch"] = len(SAMPLES)
    loss = ranks(3, on_ranks.gradients, settings, SAMPLES)[0][0]
    assert loss == pytest.approx(Reference(base_model(base), {}, 1.0).loss(SAMPLES).item(), rel=1e-5)


def test_a_head_that_equals_the_embedding_is_tied_without_a_word(ranks, tmp_path):
    base = save(tmp_path / "base", tie_word_embeddings=True)
    edit_weights(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    found, said = ranks(1, outcome, settings_for(base))[0]
    torch.testing.assert_close(found, logits(base_model(base), SAMPLES), rtol=1e-5, atol=1e-5)
    assert not said


def test_a_merge_with_a_head_that_differs_writes_that_it_is_not_tied(tmp_path):
    base = edit(save(tmp_path / "base"), tie_word_embeddings=True)
    adapter = write_adapter(random_adapter(tiny_config(), 4, frozenset({"q_proj"})), tmp_path / "adapter", 4, 12)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


BLOCKS = (16, 32)  # of scales; tensor parallel cuts the 32 columns of an expert's down_proj in two
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCKS)}


def write_fp8(folder: Path, scales_in: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """An FP8 checkpoint in the hub's form, and its weights dequantized by hand, in fp32, by their names there."""
    base = save(folder, **changes)
    dequantized = {}

    def quantize(tensors):
        for name, weight in list(tensors.items()):
            dequantized[name] = weight
            if weight.dim() == 2 and name.startswith("model.layers.") and not name.endswith("mlp.gate.weight"):
                blocks = weight.unflatten(0, (-1, BLOCKS[0])).unflatten(2, (-1, BLOCKS[1]))
                scales = (blocks.abs().amax((1, 3)) / 448).to(scales_in)
                expanded = scales.repeat_interleave(BLOCKS[0], 0).repeat_interleave(BLOCKS[1], 1).float()
                tensors[name] = (weight / expanded).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scales
                dequantized[name] = tensors[name].float() * expanded

    edit_weights(base, quantize)
    return edit(base, quantization_config=FP8, dtype="bfloat16"), dequantized


def plain(fp8: Path, folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    """The checkpoint that an FP8 one dequantizes to."""
    shutil.copytree(fp8, folder)
    save_file(
        {name: value.to(dtype) for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def base_parts(settings: dict[str, Any]) -> dict[str, tuple[Any, torch.Tensor]]:
    """This rank's parts of the base weights."""
    _, _, model = on_ranks.start(settings)
    return {shard.name: (shard.index, shard.local.clone()) for shard in model.base_shards()}


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("scales_in", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_weights_are_dequantized_bitwise_as_by_hand(ranks, tmp_path, bf16, scales_in):
    base, want = write_fp8(tmp_path / "base", scales_in)
    settings = settings_for(base, tensor=2)
    settings["hyperparameters"]["parallelism"]["bf16"] = bf16
    for parts in ranks(2, base_parts, settings):
        assert len(parts) == len(want)
        for name, (index, value) in parts.items():
            assert torch.equal(value, want[name].to(torch.bfloat16 if bf16 else torch.float32)[index]), name


def test_fp8_logits_equal_those_of_transformers(ranks, tmp_path):
    base, _ = write_fp8(tmp_path / "base", mlp_only_layers=[])
    quantization = FineGrainedFP8Config(weight_block_size=BLOCKS, dequantize=True)
    model = Qwen3MoeForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization).eval()
    found, said = ranks(1, outcome, settings_for(base))[0]
    torch.testing.assert_close(found, logits(model, SAMPLES), rtol=1e-5, atol=1e-5)
    assert not said


def test_fp8_experts_in_one_tensor_are_dequantized_the_same(ranks, tmp_path):
    base, want = write_fp8(tmp_path / "base", mlp_only_layers=[])

    def fuse(tensors):
        for i in range(3):
            experts = f"model.layers.{i}.mlp.experts"
            for suffix in ("", "_scale_inv"):
                part = {
                    kind: [tensors.pop(f"{experts}.{e}.{kind}_proj.weight{suffix}").float() for e in range(8)]
                    for kind in ("gate", "up", "down")
                }
                dtype = torch.float32 if suffix else torch.float8_e4m3fn
                both = [torch.cat(pair) for pair in zip(part["gate"], part["up"], strict=True)]
                tensors[f"{experts}.gate_up_proj{suffix}"] = torch.stack(both).to(dtype)
                tensors[f"{experts}.down_proj{suffix}"] = torch.stack(part["down"]).to(dtype)

    edit_weights(base, fuse)
    for name, (index, value) in ranks(1, base_parts, settings_for(base))[0].items():
        assert torch.equal(value, want[name][index]), name


def test_an_fp8_base_is_quantized_to_4_bits_as_the_bf16_model_it_stands_for(tmp_path):
    base, want = write_fp8(tmp_path / "base")
    same = plain(base, tmp_path / "plain", want, torch.bfloat16)
    quant = QuantSettings(block_size=32, cache_dir=str(tmp_path / "cache"))
    found, expected = (
        QuantizedCheckpoint(prepare(folder, read_config(folder), quant), read_config(folder), quant)
        for folder in (base, same)
    )
    for stacks in quantized_layers(read_config(base)):
        for stack, (experts, *_) in stacks:
            for name in (_matrix_name(stack, e) for e in range(experts)):
                one, other = found.matrix(name), expected.matrix(name)
                assert all(torch.equal(one[field], other[field]) for field in other), name


@pytest.mark.parametrize("onto", [None, QuantSettings(block_size=32)], ids=["original", "quantized-base"])
@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_a_merge_into_an_fp8_base_is_a_plain_model(tmp_path, dtype, onto):
    base, want = write_fp8(tmp_path / "base")
    adapter = write_adapter(random_adapter(tiny_config(), 4, frozenset({"q_proj", "down_proj"})), tmp_path / "a", 4, 12)
    same = plain(base, tmp_path / "plain", want, torch.bfloat16 if onto else torch.float32)
    merge_adapter(base, adapter, tmp_path / "merged", dtype, onto=onto)
    merge_adapter(same, adapter, tmp_path / "expected", "bf16" if dtype == "keep" else dtype, onto=onto)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name
        assert found[name].dtype == value.dtype or "_proj" not in name, name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    base_model(tmp_path / "merged")


QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "no method": {"bits": 4},
    "fp8 with one scale per tensor": {"quant_method": "fp8", "weight_block_size": None},
    "fp8 with bytes as scales": FP8 | {"scale_fmt": "ue8m0"},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_other_quantizations_are_refused_by_name_whatever_reads_the_model(tmp_path, kind):
    config = json.loads((save(tmp_path / "base") / "config.json").read_text())
    adapter = write_adapter(random_adapter(tiny_config(), 4, frozenset({"q_proj"})), tmp_path / "adapter", 4, 12)
    for key in ("quantization_config", "compression_config"):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {key: QUANTIZED[kind]}))
        for read in (read_config, Checkpoint, lambda base: merge_adapter(base, adapter, tmp_path / "out")):
            with pytest.raises(
                UserError, match=rf"base/config.json: {key}: (quant_method|weight_block_size|scale_fmt) = "
            ):
                read(tmp_path / "base")
        assert not (tmp_path / "out").exists()


def drop(ending: str) -> Any:
    return lambda tensors: tensors.pop(next(name for name in sorted(tensors) if name.endswith(ending)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("q_proj.weight_scale_inv"), "'model.layers.0.self_attn.q_proj.weight' is quantized but has no"),
        (drop("q_proj.weight"), "'model.layers.0.self_attn.q_proj.weight_scale_inv' belongs to no FP8 weight"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(8, 1)}),
            r"has shape \[8, 1\], which does not fit \[128, 64\] .* in blocks of 16 x 32",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.tensor(1.0)}),
            r"has shape \[\], which does not fit",
        ),
    ],
    ids=["no scales", "no weight", "other blocks", "one scale"],
)
def test_fp8_weights_and_scales_that_do_not_match_are_refused(tmp_path, change, words):
    base, _ = write_fp8(tmp_path / "base")
    with pytest.raises(UserError, match=words):
        Checkpoint(edit_weights(base, change))


def test_a_weight_in_a_quantized_form_is_named(ranks, tmp_path):
    def gptq(tensors):
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").to(torch.int32)

    found, _ = ranks(1, outcome, settings_for(edit_weights(save(tmp_path / "base"), gptq)))[0]
    assert "no tensor 'model.layers.0.self_attn.q_proj.weight'" in found
    assert "but 'model.layers.0.self_attn.q_proj.qweight'; is it quantized?" in found


def set_nan(name: str, value: float = float("nan")) -> Any:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.2.mlp.experts.5.up_proj.weight", float("nan")),
        ("model.embed_tokens.weight", float("inf")),
        ("lm_head.weight", float("-inf")),
        ("model.norm.weight", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_refused_at_load_by_name(ranks, tmp_path, name, value):
    base = edit_weights(save(tmp_path / "base"), set_nan(name, value))
    found, _ = ranks(1, outcome, settings_for(base))[0]
    assert f"base/model.safetensors: tensor {name!r} holds values that are not finite" in found


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_merge_with_weights_that_are_not_finite_writes_nothing(tmp_path, name):
    base = edit_weights(save(tmp_path / "base"), set_nan(name))
    adapter = write_adapter(random_adapter(tiny_config(), 4, frozenset({"q_proj"})), tmp_path / "adapter", 4, 12)
    with pytest.raises(UserError, match=f"tensor '{name}' holds values that are not finite"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_finite_values_are_told_from_others_in_every_type(dtype):
    values = torch.randn(1000).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    assert not all_finite(torch.cat([values.float(), torch.tensor([float("nan")])]).to(dtype))
    if dtype != torch.float8_e4m3fn:  # without infinity
        assert not all_finite(torch.cat([values, torch.tensor([float("inf"), float("-inf")]).to(dtype)]))
        assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)), "the sum overflows"


def write_index(base: Path, file: str) -> None:
    names = load_file(base / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def test_a_single_file_is_read_and_not_a_stale_index_beside_it(ranks, tmp_path):
    base = save(tmp_path / "base")
    write_index(base, "model-00001-of-00001.safetensors")
    found, said = ranks(1, outcome, settings_for(base))[0]
    torch.testing.assert_close(found, logits(base_model(base), SAMPLES), rtol=1e-5, atol=1e-5)
    assert said.count("has both model.safetensors and model.safetensors.index.json: the first is read") == 1


def test_an_index_of_the_single_file_is_nothing_to_warn_of(tmp_path, capsys):
    base = save(tmp_path / "base")
    write_index(base, "model.safetensors")
    capsys.readouterr()
    Checkpoint(base)
    assert not capsys.readouterr().err
