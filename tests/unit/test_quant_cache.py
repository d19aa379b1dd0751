"""The cache of quantized checkpoints is built once, does not depend on layout or path, and is verified when read."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft.config.schema import QuantSettings
from megasft.messages import UserError
from megasft.model import quantized_base
from megasft.model.hf_config import read_config
from megasft.model.quantized_base import QuantizedCheckpoint, prepare
from megasft.quant import nf4
from tests.parity.quantized import config_in_blocks, linears
from tests.parity.reference import random_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A bf16 checkpoint of three layers, the middle one dense, and its matrices."""
    folder = tmp_path_factory.mktemp("pristine")
    model = random_model(config_in_blocks()).bfloat16()
    model.save_pretrained(folder)
    return folder, linears(model)


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine[0], tmp_path / "model")


@pytest.fixture
def quantize(model, tmp_path):
    """`quantize(**settings)`: the folder in the cache with the checkpoint of `model`."""

    def run(folder: Path = model, workers: int = 2, **settings) -> Path:
        return prepare(folder, read_config(folder), QuantSettings(cache_dir=tmp_path / "cache", **settings), workers)

    return run


def opened(folder: Path, model: Path, **settings) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(folder, read_config(model), QuantSettings(**settings))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """A list of the matrices quantized from now on."""
    names = []
    quantize = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", lambda *args: names.append(args[-1]) or quantize(*args))
    return names


def _processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


def spoil(model: Path, change, name: str = "model.safetensors") -> None:
    tensors = load_file(model / name)
    change(tensors)
    save_file(tensors, model / name, {"format": "pt"})


def flip_a_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("double", [True, False])
def test_the_cache_holds_every_quantized_matrix(pristine, quantize, model, double):
    cached = opened(quantize(double=double), model, double=double)
    for name, matrix in pristine[1].items():
        want = nf4.quantize(matrix.detach(), QuantSettings(double=double), name)
        got = cached.matrix(name)
        assert got.keys() == want.keys()
        for field, value in want.items():
            assert torch.equal(got[field], value), (name, field)


def test_fused_experts_give_the_same_cache(pristine, quantize, model, tmp_path):
    def fuse(tensors):
        for layer in (0, 2):
            path = f"model.layers.{layer}.mlp.experts"
            parts = {
                kind: [tensors.pop(f"{path}.{e}.{kind}_proj.weight") for e in range(8)]
                for kind in ("gate", "up", "down")
            }
            tensors[f"{path}.gate_up_proj"] = torch.stack(
                [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
            )
            tensors[f"{path}.down_proj"] = torch.stack(parts["down"])

    per_expert = quantize()
    spoil(model, fuse)
    fused = quantize()
    assert fused != per_expert
    files = sorted(per_expert.glob("*.safetensors"))
    assert len(files) == 3  # one a layer
    for file in files:
        ours, theirs = load_file(file), load_file(fused / file.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            # a sum is of the folder too
            assert torch.equal(ours[name], theirs[name]) != name.endswith(".sums"), name


def test_a_second_start_quantizes_nothing_wherever_the_checkpoint_lies(quantize, model, tmp_path, made):
    first = quantize()
    assert len(made) == len(set(made)) == 3 * 4 + 3 + 2 * 8 * 3
    copy = shutil.copytree(model, tmp_path / "copy")
    assert quantize() == quantize(copy) == first
    assert len(made) == 63


def test_another_checkpoint_or_format_gets_its_own_cache(quantize, model):
    folders = [quantize(), quantize(double=False), quantize(block_size=32)]
    spoil(model, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].neg_())
    assert len({*folders, quantize()}) == 4


@pytest.mark.parametrize(
    "damage", ["truncated", "a file short", "no manifest", "half a manifest", "no files in it", "empty"]
)
def test_an_incomplete_cache_is_named_and_rebuilt(quantize, damage, capsys, made):
    folder = quantize()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    layer, manifest = folder / "layer-00001.safetensors", folder / quantized_base.MANIFEST
    if damage == "truncated":
        os.truncate(layer, layer.stat().st_size - 100)
    elif damage == "a file short":
        layer.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "no files in it":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    else:
        for file in folder.iterdir():
            file.unlink()
    made.clear()
    assert quantize() == folder
    assert made
    assert str(folder) in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_cache_of_another_checkpoint_is_named_and_rebuilt(quantize, model, capsys, made):
    folder = quantize()
    spoil(model, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].neg_())
    other = quantize()
    shutil.rmtree(folder)
    other.rename(folder)
    spoil(model, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].neg_())
    made.clear()
    capsys.readouterr()
    assert quantize() == folder
    assert made
    assert f"{folder}: belongs to another checkpoint ({model})" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["packed", "scales", "groups", "mean", "sums"])
def test_a_flipped_bit_is_refused_by_name_and_a_deleted_folder_rebuilt(quantize, model, field):
    folder = quantize()
    file = quantized_base.TensorFile(folder / "layer-00002.safetensors")
    stack, name = "model.layers.2.mlp.experts.up_proj", "model.layers.2.mlp.experts.6.up_proj.weight"
    entry = file.tensor(f"{stack}.{field}")
    flip_a_bit(file.path, file.offsets[f"{stack}.{field}"] + 6 * entry[0].nbytes + entry[0].nbytes // 2)
    cached = opened(folder, model)
    cached.matrix("model.layers.2.mlp.experts.5.up_proj.weight")
    with pytest.raises(UserError) as error:
        cached.matrix(name)
    for word in (str(file.path), name, "corrupted", f"delete {folder}"):
        assert word in str(error.value)
    shutil.rmtree(folder)
    opened(quantize(), model).matrix(name)


@pytest.mark.parametrize(
    "damage", ["a zeroed matrix", "a zeroed file", "swapped halves", "swapped experts", "another checkpoint's layer"]
)
def test_zeroed_or_moved_data_is_refused_by_name(quantize, model, damage):
    folder = quantize()
    file = quantized_base.TensorFile(folder / "layer-00002.safetensors")
    stack, name = "model.layers.2.mlp.experts.up_proj", "model.layers.2.mlp.experts.6.up_proj.weight"
    fields = [field for field in file.specs if field.startswith(stack)]
    assert len(fields) == 5
    data = bytearray(file.path.read_bytes())

    def place(field: str, e: int) -> slice:
        size = file.tensor(field)[e].nbytes
        return slice(file.offsets[field] + e * size, file.offsets[field] + (e + 1) * size)

    if damage == "a zeroed matrix":
        for at in (place(field, 6) for field in fields):
            data[at] = bytes(at.stop - at.start)
    elif damage == "a zeroed file":
        begin = min(file.offsets.values())
        data[begin:] = bytes(len(data) - begin)
    elif damage == "swapped halves":
        at = place(f"{stack}.packed", 6)
        middle = (at.start + at.stop) // 2
        data[at] = data[middle : at.stop] + data[at.start : middle]
    elif damage == "swapped experts":
        for field in fields:
            five, six = place(field, 5), place(field, 6)
            data[five], data[six] = data[six], data[five]
    else:
        spoil(model, lambda tensors: tensors[name].neg_())
        data = bytearray((quantize() / file.path.name).read_bytes())
    file.path.write_bytes(data)
    with pytest.raises(UserError, match=f"{file.path}: {name!r} is corrupted: .*; delete {folder}"):
        opened(folder, model).matrix(name)


@pytest.mark.parametrize("damage", ["a renamed tensor", "another type", "another layer's file", "a zeroed header"])
def test_a_file_with_other_tensors_is_refused_by_name(quantize, model, damage):
    folder = quantize()
    file = folder / "layer-00002.safetensors"
    tensors = load_file(file)
    if damage == "a renamed tensor":
        tensors["model.layers.2.mlp.experts.up_proj.codes"] = tensors.pop("model.layers.2.mlp.experts.up_proj.packed")
        save_file(tensors, file)
    elif damage == "another type":
        tensors["model.layers.2.mlp.experts.up_proj.scales"] = tensors[
            "model.layers.2.mlp.experts.up_proj.scales"
        ].int()
        save_file(tensors, file)
    elif damage == "another layer's file":
        shutil.copy(folder / "layer-00000.safetensors", file)
    else:
        data = file.read_bytes()
        file.write_bytes(bytes(100) + data[100:])
    with pytest.raises(UserError, match=f"{file}: corrupted.*; delete {folder}, and the next run rebuilds it"):
        opened(folder, model).matrix("model.layers.2.mlp.experts.6.up_proj.weight")


def test_the_checksum_detects_two_changes_that_cancel_in_a_plain_sum():
    """Two changes that cancel in a plain or an odd-weighted sum of words, in small and large pieces."""
    for words in (2, 7, quantized_base._PIECE + 5):
        value = torch.zeros(words, dtype=torch.int32)
        changed = [value]
        for first, last in ((1, 2**31 - 1), (-(2**31), -(2**31)), (3, -3)):
            changed.append(value.clone())
            changed[-1][0], changed[-1][-1] = first, last
            changed.append(changed[-1].flip(0))
        sums = {tuple(one.tolist()): int(quantized_base._sum(one, "key")) for one in changed}
        assert len(set(sums.values())) == len(sums)
        assert int(quantized_base._sum(value, "another key")) not in sums.values()


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "values not finite"), (1e5, "beyond fp16's 65504")])
def test_a_matrix_that_cannot_be_quantized_is_refused_by_name_and_leaves_no_cache(
    quantize, model, tmp_path, value, said, two_threads
):
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    spoil(model, lambda tensors: tensors[name].__setitem__((1, 2), value))
    with pytest.raises(UserError, match=f"tensor '{name}' holds .*{said}"):
        quantize()
    assert not [folder for folder in (tmp_path / "cache" / "nf4").glob("*") if folder.is_dir()]
    with ThreadPoolExecutor(1) as pool:  # what a new thread takes over
        assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [2, 2]


def test_a_missing_tensor_is_refused_before_anything_is_quantized(quantize, model, made):
    spoil(model, lambda tensors: tensors.pop("model.layers.2.mlp.experts.7.down_proj.weight"))
    with pytest.raises(UserError, match=r"has no tensor 'model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight'"):
        quantize()
    assert not made


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(quantize, model, monkeypatch):
    sums = quantized_base._sums
    config = (model / "config.json").read_text()
    monkeypatch.setattr(
        quantized_base, "_sums", lambda *args: (model / "config.json").write_text(config + " ") and sums(*args)
    )
    with pytest.raises(UserError, match="changed while it was read"):
        quantize()


def test_a_run_killed_while_quantizing_leaves_no_usable_cache(quantize, model, tmp_path):
    process = _processes().Process(target=_slowly, args=(model, tmp_path / "cache"))
    process.start()
    root = tmp_path / "cache" / "nf4"
    deadline = time.monotonic() + 120  # importing everything may take long
    while not list(root.glob(f"*@{socket.gethostname()}.part/layer-00001.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = quantize()
    assert {path.name for path in root.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert json.loads((folder / quantized_base.MANIFEST).read_text())["key"] == folder.name


def _slowly(model: Path, cache: Path) -> None:
    quantize = nf4.quantize
    nf4.quantize = lambda *args: time.sleep(0.1) or quantize(*args)
    prepare(model, read_config(model), QuantSettings(cache_dir=cache), 1)


def test_two_runs_at_once_quantize_once(model, tmp_path, quantize):
    queue = _processes().Queue()
    processes = [_processes().Process(target=_count, args=(model, tmp_path / "cache", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert counts == [0, 63]


def _count(model: Path, cache: Path, queue) -> None:
    names = []
    quantize = nf4.quantize
    nf4.quantize = lambda *args: names.append(args[-1]) or quantize(*args)
    prepare(model, read_config(model), QuantSettings(cache_dir=cache), 1)
    queue.put(len(names))
