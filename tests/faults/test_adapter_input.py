"""Unusable adapters and bases: one line with the reason, exit code 2, and no files left behind."""

import json
import pickle
import re
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft import cli
from megasft.adapters.export import export_adapter
from megasft.adapters.model_io import load_adapter
from megasft.config.values import LINEAR_LAYERS
from megasft.messages import UserError
from tests.parity.reference import PREFIX, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, DOWN = f"{PREFIX}model.layers.0.self_attn.q_proj", f"{PREFIX}model.layers.2.mlp.experts.5.down_proj"


EXPERTS = f"{PREFIX}model.layers.1.mlp.experts"


class Exploding:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploding(folder / "exploded")))


def set_nan(tensors):
    tensors[f"{DOWN}.lora_B.weight"][3, 1] = float("nan")


def set_infinite(tensors):
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("inf")


def of_more_layers(tensors):
    tensors |= {name.replace("layers.2.", "layers.3."): value.clone() for name, value in tensors.items()}


def of_more_experts(tensors):
    tensors |= {name.replace("experts.5.", "experts.8."): value.clone() for name, value in tensors.items()}


def of_other_width(tensors):
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        tensors[name] = torch.cat([tensors[name]] * 2, dim=1)


# What is wrong, how to bring it about, and what the line says. These are wrong whatever is done with the adapter.
BROKEN = {
    "no such folder": (lambda folder: (folder / CONFIG).unlink(), "it has no adapter_config.json"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as an adapter configuration"),
    "not an object": (lambda folder: (folder / CONFIG).write_text("[]"), "cannot be read as an adapter configuration"),
    "another method": (lambda folder: edit_config(folder, peft_type="IA3"), "peft_type = 'IA3'"),
    "DoRA": (lambda folder: edit_config(folder, use_dora=True), "use_dora = True is not supported"),
    "PiSSA": (lambda folder: edit_config(folder, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "no rank": (lambda folder: edit_config(folder, r=None), "ranks in rank_pattern must be positive"),
    "bad pattern": (lambda folder: edit_config(folder, rank_pattern={"(": 4}), "patterns valid regular expressions"),
    "rank not of the tensors": (lambda folder: edit_config(folder, r=8), "sets its rank to 8"),
    "pickled": (pickled, "pickled adapters are never read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no such file"),
    "truncated": (truncate, "corrupted or not a safetensors file"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "corrupted or not a safetensors file"),
    "NaN": (lambda folder: edit_tensors(folder, set_nan), "lora_B.weight' holds values that are not finite"),
    "infinite": (lambda folder: edit_tensors(folder, set_infinite), "lora_A.weight' holds values that are not finite"),
    "A without B": (lambda folder: edit_tensors(folder, lambda t: t.pop(f"{Q}.lora_B.weight")), "lora_A but no lora_B"),
    "a bias too": (
        lambda folder: edit_tensors(folder, lambda t: t.update({f"{Q}.bias": torch.ones(4)})),
        "q_proj.bias'",
    ),
}
# These are good adapters, of another model.
FOREIGN = {
    "more layers": (lambda folder: edit_tensors(folder, of_more_layers), "'model.layers.3."),
    "more experts": (lambda folder: edit_tensors(folder, of_more_experts), "experts.8."),
    "other width": (lambda folder: edit_tensors(folder, of_other_width), r"(has|and) \d+ inputs"),
}
# These are good adapters of this model, not what the job asks for (r = 4, alpha = 12, all layers).
OTHER = {
    "rank": (lambda folder: remake(folder, r=2, alpha=6), "r = 2, but .lora. r = 4; .*set .lora. r = 2 and alpha = 6"),
    "alpha": (lambda folder: edit_config(folder, lora_alpha=8), "lora_alpha = 8 .*= 12 by 3; set .lora. alpha = 8"),
    "a layer less": (lambda folder: remake(folder, leave_out="o_proj"), "adapts down_proj, .*v_proj, but .*all-linear, gate"),
    "one expert less": (
        lambda folder: edit_tensors(folder, lambda t: [t.pop(f"{DOWN}.lora_{m}.weight") for m in "AB"]),
        "no adapter for 'model.layers.2.mlp.experts.5.down_proj'",
    ),
    "one A for gate and up": (
        lambda folder: fuse(folder, lambda t: t[f"{EXPERTS}.base_layer.lora_B.weight"].fill_(1)),
        "share an A of rank 8 .*set .lora. r = 8 and alpha = 24",
    ),
}  # fmt: skip


def remake(folder, r=4, alpha=12, leave_out=""):
    targets = frozenset(LINEAR_LAYERS) - {leave_out}
    write_adapter(random_adapter(tiny_config(mlp_only_layers=[]), r, targets), folder, r, alpha)


def fuse(folder, change):
    export_adapter(folder, folder / "fused", "fused")
    for name in (CONFIG, WEIGHTS):
        (folder / "fused" / name).replace(folder / name)
    (folder / "fused").rmdir()
    edit_tensors(folder, change)


def try_all(settings, folders):
    """The error of `load_adapter` for each folder, "" without one."""
    _, topology, model = on_ranks.start(settings)
    said = []
    for folder in folders:
        try:
            with topology.together():
                load_adapter(model, folder)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_every_rank_refuses_an_unsuitable_adapter_with_the_same_error(ranks, tmp_path):
    random_model(tiny_config(mlp_only_layers=[])).save_pretrained(tmp_path / "base")
    cases = {"good": (lambda folder: None, "")} | BROKEN | FOREIGN | OTHER
    for name, (spoil, _) in cases.items():
        remake(tmp_path / name)
        spoil(tmp_path / name)
    settings = {
        "job": {"model": str(tmp_path / "base")},
        "lora": {"r": 4, "alpha": 12.0, "target_modules": list(LINEAR_LAYERS)},
        "data": {"topology": {"tensor_parallel": 2, "expert_parallel": 2}},
        "hyperparameters": {"parallelism": {"bf16": False}},
    }
    said = ranks(2, try_all, settings, [tmp_path / name for name in cases])
    assert said[0] == said[1]
    for (name, (_, want)), line in zip(cases.items(), said[0], strict=True):
        assert bool(line) == bool(want), (name, line)
        assert matches(want, line), (name, line)
        assert "\n" not in line
        assert not line or str(tmp_path / name) in line
    assert not list(tmp_path.rglob("exploded"))


def matches(want, line):
    return re.search(want, line) is not None


def refused(capsys, monkeypatch, *arguments) -> str:
    """The one line of the command's error."""
    monkeypatch.setattr(sys, "argv", ["megasft", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture
def world(tmp_path):
    random_model(tiny_config(mlp_only_layers=[])).save_pretrained(tmp_path / "base")
    remake(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("case", [*BROKEN, *FOREIGN])
def test_merge_refuses_a_broken_or_foreign_adapter_and_leaves_no_output(world, capsys, monkeypatch, case):
    spoil, want = (BROKEN | FOREIGN)[case]
    spoil(world / "adapter")
    arguments = (world / "adapter", world / "out", "--model", world / "base")
    assert matches(want, refused(capsys, monkeypatch, "merge", *arguments))
    assert {path.name for path in world.iterdir()} == {"base", "adapter"}
    assert not list(world.rglob("exploded"))


@pytest.mark.parametrize("case", BROKEN)
def test_export_refuses_a_broken_adapter_and_leaves_no_output(world, capsys, monkeypatch, case):
    spoil, want = BROKEN[case]
    spoil(world / "adapter")
    line = refused(capsys, monkeypatch, "export", world / "adapter", world / "out", "--layout", "fused")
    assert matches(want, line)
    assert {path.name for path in world.iterdir()} == {"base", "adapter"}


def full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**5, 10**5)
    monkeypatch.setattr("megasft.adapters.merge.shutil.disk_usage", lambda path: usage)


def disk_that_fills_up(monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megasft.storage.safetensors.os.posix_fallocate", no_room)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_an_output_folder_with_files_is_refused_and_unchanged(world, capsys, monkeypatch, command):
    (world / "out").mkdir()
    (world / "out" / "mine").write_text("precious")
    arguments = {
        "merge": (world / "adapter", world / "out", "--model", world / "base"),
        "export": (world / "adapter", world / "out"),
    }[command]
    assert "already holds files" in refused(capsys, monkeypatch, command, *arguments)
    assert [path.name for path in (world / "out").iterdir()] == ["mine"]
    assert {path.name for path in world.iterdir()} == {"base", "adapter", "out"}


def broken_base(world):
    data = (world / "base" / "model.safetensors").read_bytes()
    (world / "base" / "model.safetensors").write_bytes(data[:-10])


def quantized_base(world):
    tensors = load_file(world / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, world / "base" / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "want"),
    [
        (lambda world, patch: full_disk(patch), r"needs \d\d\d\.\d kB, \d\d\d\.\d kB more than its disk has free"),
        (lambda world, patch: disk_that_fills_up(patch), "No space left on device"),
        (lambda world, patch: broken_base(world), "model.safetensors: corrupted or not a safetensors file"),
        (lambda world, patch: quantized_base(world), "q_proj.weight' is quantized"),
        (lambda world, patch: (world / "base" / "config.json").unlink(), "not a model folder"),
    ],
    ids=["no room", "disk fills up", "base truncated", "base quantized", "base without configuration"],
)
def test_merge_refuses_unreadable_input_and_unwritable_output(world, capsys, monkeypatch, spoil, want):
    spoil(world, monkeypatch)
    arguments = (world / "adapter", world / "out", "--model", world / "base")
    assert matches(want, refused(capsys, monkeypatch, "merge", *arguments))
    assert {path.name for path in world.iterdir()} == {"base", "adapter"}


def test_an_invalid_size_is_refused(world, capsys, monkeypatch):
    arguments = (world / "adapter", world / "out", "--max-shard-size", "big")
    assert "'big' is not a size" in refused(capsys, monkeypatch, "merge", *arguments)


def test_an_adapter_that_names_no_base_needs_the_option(world, capsys, monkeypatch):
    arguments = (world / "adapter", world / "out")
    assert "pass --model" in refused(capsys, monkeypatch, "merge", *arguments)
