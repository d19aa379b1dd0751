"""An adapter with LoRA of the router: what `export` and `merge` keep, leave out and say, and the command for vLLM."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megasft.adapters.adapter_file import AdapterFile
from megasft.adapters.export import export_adapter
from megasft.cli import app
from megasft.config.values import ALL_LINEAR, LINEAR_LAYERS
from megasft.generation.request import Request
from megasft.messages import UserError
from tests.parity.peft_adapters import base_model, loaded_by_peft, logits
from tests.parity.reference import random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA = 4, 12.0
SAMPLES = on_ranks.random_samples(203, [24] * 4)
ROUTERS = 2  # of three layers, one is dense


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base/, and adapters of all layers (full/), of all but the router (plain/), of the router (router/)."""
    folder, config = tmp_path_factory.mktemp("router"), tiny_config()
    random_model(config).save_pretrained(folder / "base")
    for name, targets in (("full", LINEAR_LAYERS), ("plain", ALL_LINEAR), ("router", ("gate",))):
        write_adapter(random_adapter(config, R, frozenset(targets)), folder / "written" / name, R, ALPHA)
        export_adapter(folder / "written" / name, folder / name, base_model=str(folder / "base"))
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_an_export_without_the_router_is_the_adapter_that_was_trained_but_for_the_router(world, tmp_path, layout):
    export_adapter(world / "full", tmp_path / "full", layout)
    said = run("export", tmp_path / "full", tmp_path / "out", "--without-router", "--layout", layout)
    assert f"without the LoRA of {ROUTERS} router(s), tokens go to the experts that the base chooses" in said
    assert "answers differ from those of the trained model; `megasft merge` keeps it" in said
    assert AdapterFile(tmp_path / "out").settings().targets == set(ALL_LINEAR)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # SGLang asks for a size of every name here.
    assert "gate" not in config["target_modules"]
    assert "mlp.gate.weight" not in (config["target_parameters"] or [])
    full, rest = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("full", "out"))
    assert {name for name in full if name not in rest} == {name for name in full if ".mlp.gate." in name}
    assert all(torch.equal(value, full[name]) for name, value in rest.items())
    # peft agrees that it is another model than the trained one.
    trained, served = (logits(loaded_by_peft(world / "base", tmp_path / name), SAMPLES) for name in ("full", "out"))
    assert (trained - served).abs().max() > 0.05


def test_export_and_merge_say_what_becomes_of_a_router(world, tmp_path):
    said = run("export", world / "full", tmp_path / "kept")
    assert f"has the LoRA of {ROUTERS} router(s): vLLM" in said
    assert "SGLang" in said
    assert "`megasft merge` keeps it for any server, and --without-router exports the rest" in said
    said = run("merge", world / "full", tmp_path / "merged", "--model", world / "base")
    assert f"the LoRA of {ROUTERS} router(s) is merged too" in said
    for arguments in (("export", world / "plain", tmp_path / "same"), ("merge", world / "plain", tmp_path / "plain")):
        assert "router" not in run(*arguments)
    assert "no LoRA of a router; nothing is left out" in run(
        "export", world / "plain", tmp_path / "again", "--without-router"
    )


def test_a_merged_router_routes_as_the_trained_one(world, tmp_path):
    run("merge", world / "router", tmp_path / "merged", "--model", world / "base")
    want = logits(loaded_by_peft(world / "base", world / "router"), SAMPLES)
    torch.testing.assert_close(logits(base_model(tmp_path / "merged"), SAMPLES), want, rtol=1e-5, atol=1e-5)
    assert (want - logits(base_model(world / "base"), SAMPLES)).abs().max() > 0.05


def test_without_the_router_nothing_is_left_of_an_adapter_of_it_alone(world, tmp_path):
    with pytest.raises(UserError, match="adapts only the router; without it nothing is left to export"):
        export_adapter(world / "router", tmp_path / "out", without_router=True)
    assert not list(tmp_path.iterdir())


def test_the_vllm_command_merges_an_adapter_of_the_router(world):
    folder = world / "full"
    assert Request("base", str(folder)).vllm_command() == (
        f"megasft merge {folder} {folder}-merged --model base && vllm serve {folder}-merged"
    )
    assert Request("base", str(world / "plain")).vllm_command().startswith("vllm serve base --enable-lora")
