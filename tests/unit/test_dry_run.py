"""`megasft train --dry-run` finds without ranks what ranks would find."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft import cli, host
from megasft.checks.gpus import check_memory
from megasft.config.schema import load_config
from megasft.messages import UserError
from megasft.model.hf_checkpoint import needed
from megasft.model.hf_config import read_config
from tests.support.world import make_world

GiB = 2**30


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    make_world(folder, tensor=2, data=1)
    return folder


@pytest.fixture
def world(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "world")
    run_file = folder / "job.toml"
    run_file.write_text(run_file.read_text().replace(str(pristine), str(folder)))
    return folder


@pytest.fixture
def dry_run(world, capsys, monkeypatch):
    """`dry_run(*arguments)`: exit code, output and errors."""

    def run(*arguments):
        command = ["megasft", "train", "--config", f"{world}/job.toml", "--dry-run", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_a_good_job_is_checked_and_planned_and_nothing_is_launched(dry_run, world):
    code, said, errors = dry_run()
    assert code == 0, errors
    assert re.search(r"^weights: \d+ tensors in 1 files", said, re.MULTILINE)
    assert len(re.findall(r"the first \d+ conversations make [\d,]+ tokens, [\d,]+ of them supervised", said)) == 2
    assert "[job] output_dir" in said
    assert re.search(r"^  peak  +\d", said, re.MULTILINE)
    assert not (world / "run").exists()


def test_a_tensor_of_another_shape_is_found(dry_run, world):
    in_weights(world, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    code, _, errors = dry_run()
    assert code == 2
    assert "'model.norm.weight' has shape [65], but config.json implies [64]" in errors


def test_a_missing_and_a_surplus_tensor_are_found(dry_run, world):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    in_weights(world, lambda tensors: tensors.pop(name))
    code, _, errors = dry_run()
    assert code == 2
    assert f"has no tensor {name!r}" in errors
    in_weights(world, lambda tensors: tensors.update({name: torch.ones(64, 32), "model.extra": torch.ones(1)}))
    assert "such as 'model.extra'" in dry_run()[2]


def test_a_conversation_after_the_first_that_cannot_be_used_is_found(dry_run, world):
    path = world / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"messages": [{"role": "user", "content": "x"}]}\n', *lines[2:]]))
    code, _, errors = dry_run()
    assert code == 2
    assert "train.jsonl:3" in errors
    code, said, _ = dry_run("--set", 'data.on_error="skip"')
    assert code == 0
    assert "; 1 cannot be used" in said


def test_a_full_disk_is_found(dry_run, monkeypatch):
    from megasft.checks import dry_run as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    code, _, errors = dry_run()
    assert code == 2
    assert re.search(r"some [\d.]+ .B are needed on its disk, 1.0 kB are free", errors)


def test_under_torchrun_it_is_refused(dry_run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "run it without torchrun" in dry_run()[2]


def test_what_the_model_needs_is_what_the_checkpoint_has(world):
    tensors = load_file(world / "model" / "model.safetensors")
    assert dict(needed(read_config(world / "model"))) == {name: tuple(t.shape) for name, t in tensors.items()}


def test_a_launch_that_does_not_fit_the_free_memory_is_refused(world, monkeypatch):
    config, model = load_config(world / "job.toml"), read_config(world / "model")
    check_memory(config, model, 2)  # on CPUs
    monkeypatch.setattr(host, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    free = 141 * GiB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 141 * GiB))
    check_memory(config, model, 2)
    free = 2**20
    with pytest.raises(UserError, match=r"of which 0\.0 GiB are free"):
        check_memory(config, model, 2)
    check_memory(load_config(world / "job.toml", ["compute.ignore_plan=true"]), model, 2)


def in_weights(world: Path, change):
    path = world / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
