"""Corrupted and falsified checkpoints: the run resumes from the previous one, or ends with one clear line."""

import hashlib
import json
import re
import shutil
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.train.checkpoint.folder import damage
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parallel.resume import Runs
from tests.support import on_ranks

CASE = Case(2, tensor=2, expert_tensor=2, batch=2)
LAST, BEFORE = "step-000008", "step-000006"  # of what Runs trains
OPTIMIZER = "optimizer-00001-of-00002.safetensors"
FILES = [
    "adapter_config.json", "adapter_model.safetensors", "config.toml", "manifest.json", "optimizer-00000-of-00002.safetensors",
    OPTIMIZER, "state.json",
]  # fmt: skip


def resumed(settings: dict[str, Any], samples: list[on_ranks.Sample], tries: list[tuple[str, str]]) -> list[str]:
    """The outcome of resuming each (output_dir, resume): "step N", the text of a UserError, or a traceback."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    came: list[str] = []
    for output, setting in tries:
        changed = {"job": settings["job"] | {"output_dir": output}, "checkpoint": {"resume": setting}}
        trainer.config = RunConfig.from_dict(settings | changed)
        trainer.output_dir = Path(output)
        try:
            trainer._resume()
            came.append(f"step {trainer.step}")
        except UserError as error:
            came.append(str(error))
        except Exception:
            came.append(traceback.format_exc())
    return came


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("damage"), ranks)
    runs.run(CASE, "whole")
    return runs


@pytest.fixture
def try_each(runs, ranks, tmp_path) -> Callable[[dict[str, Callable[[Path], Any]], str], dict[str, str]]:
    """`try_each({name: spoil}, resume)`: the outcomes of resuming copies of the run with a spoiled newest checkpoint."""

    def run(spoils: dict[str, Callable[[Path], Any]], setting: str) -> dict[str, str]:
        tries = []
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for i, spoil in enumerate(spoils.values()):
            checkpoints = folder / str(i) / "checkpoints"
            for name in (LAST, BEFORE):
                shutil.copytree(runs.folder / "whole" / "checkpoints" / name, checkpoints / name)
            (checkpoints / "latest").symlink_to(LAST)
            spoil(checkpoints / LAST)
            tries.append((str(folder / str(i)), setting.format(checkpoints)))
        inside = sorted(path.name for path in folder.iterdir())
        answers = ranks(CASE.ranks, resumed, runs.settings(CASE, "unused"), runs.samples, tries)
        assert answers[0] == answers[1], "every rank comes to the same"
        assert sorted(path.name for path in folder.iterdir()) == inside
        return dict(zip(spoils, answers[0], strict=True))

    return run


def assert_one_line_each(came: dict[str, str]) -> None:
    for name, words in came.items():
        assert "Traceback" not in words, f"{name}: {words}"
        assert not words.startswith("step "), f"{name}: went on"
        assert LAST in words, f"{name}: {words}"
        assert "\n" not in words, f"{name}: {words}"
        assert len(words) < 700, f"{name}: {words}"


# --- damage ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {
    f"{name} {how.__name__}": lambda folder, name=name, how=how: how(folder / name)
    for name in FILES
    for how in (truncate, flip_a_bit, empty, Path.unlink)
}


def test_every_file_is_held_against_the_manifest_by_one_of_the_ranks(runs, tmp_path):
    whole = runs.folder / "whole" / "checkpoints" / LAST
    assert sorted(path.name for path in whole.iterdir()) == FILES
    assert [damage(whole, part, 2) for part in range(2)] == [None, None]
    for name in FILES:
        if name == "manifest.json":  # nothing to compare it with; a test below checks its content
            continue
        folder = shutil.copytree(whole, tmp_path / name)
        content = (folder / name).read_bytes()
        # Same size and still readable: JSON and TOML accept a blank for a line break.
        changed = content.replace(b"\n", b" ", 1) if name.endswith((".json", ".toml")) else content[:-1] + b"\1"
        assert content != changed
        (folder / name).write_bytes(changed)
        found = [damage(folder, part, 2) for part in range(2)]
        assert found.count(None) == 1, f"{name}: {found}"
        assert f"{name} is corrupted: its checksum is not that of manifest.json" in found


def test_resume_skips_a_corrupted_checkpoint_for_the_previous_one(try_each):
    came = try_each(DAMAGES, "auto")
    assert came == dict.fromkeys(DAMAGES, "step 6")


def test_a_requested_corrupted_checkpoint_is_refused_naming_the_file(try_each):
    came = try_each(DAMAGES, f"{{}}/{LAST}")
    assert_one_line_each(came)
    for name, words in came.items():
        # Of a bit in the manifest that stands for another file, that file is named, and the manifest with it.
        own = words if name.startswith("manifest.json") else words.replace("not that of manifest.json", "")
        assert name.split()[0] in own


def test_if_all_checkpoints_are_corrupted_one_line_says_how_to_restart(try_each):
    def all_of_them(folder: Path) -> None:
        for name in (LAST, BEFORE):
            empty(folder.with_name(name) / "state.json")

    words = try_each({"all": all_of_them}, "auto")["all"]
    assert "all checkpoints in it are corrupted; start from scratch with --resume never" in words


def test_the_latest_link_has_no_effect_on_resuming(try_each):
    def replace_link(by: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def spoil(folder: Path) -> None:
            link = folder.with_name("latest")
            link.unlink()
            by(link)

        return spoil

    spoils = {
        "none": replace_link(lambda link: None), "nowhere": replace_link(lambda link: link.symlink_to("step-000099")),
        "a file": replace_link(lambda link: link.write_text("")), "itself": replace_link(lambda link: link.symlink_to("latest")),
    }  # fmt: skip
    assert try_each(spoils, "auto") == dict.fromkeys(spoils, "step 8")
    came = try_each({name: spoils[name] for name in ("nowhere", "a file", "itself")}, "{}/latest")
    assert all("no such folder" in words for words in came.values())


# --- lies: the checksums are right ---


def seal(folder: Path) -> None:
    """Make the manifest match the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def writing(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if name != "manifest.json":
            seal(folder)

    return spoil


def changing(name: str, *path: str, to: Any = None, drop: bool = False) -> Callable[[Path], None]:
    """Change one value in a JSON file."""

    def spoil(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        place = whole
        for key in path[:-1]:
            place = place[key]
        if drop:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        (folder / name).write_text(json.dumps(whole))
        if name != "manifest.json":
            seal(folder)

    return spoil


DEEP = "[" * 100_000 + "]" * 100_000
NOT_COUNTS = ["12", None, -1, 1.5, 2**70, float("nan"), float("inf"), True, [], {}]
ENTRY = {"bytes": 0, "sha256": "0" * 64}

MANIFESTS: dict[str, Callable[[Path], Any]] = {
    "no JSON": writing("manifest.json", "{"), "no text": writing("manifest.json", b"\xff\xfe{}"), "deep": writing("manifest.json", DEEP),
    "a list": writing("manifest.json", "[]"), "a number": writing("manifest.json", "1" * 5000), "empty": writing("manifest.json", "{}"),
    "no files": changing("manifest.json", "files", drop=True), "files a list": changing("manifest.json", "files", to=[1, 2]),
    "files empty": changing("manifest.json", "files", to={}), "entry a number": changing("manifest.json", "files", "state.json", to=3),
    "other format": changing("manifest.json", "format", to=2), "format long": changing("manifest.json", "format", to="x" * 10**6),
    "state left out": changing("manifest.json", "files", "state.json", drop=True),
    "digest a number": changing("manifest.json", "files", "state.json", "sha256", to=7),
    **{f"named {name!r:.30}": changing("manifest.json", "files", name, to=ENTRY)
       for name in ("../../x", "/etc/passwd", "..", "", "a\0b", "a/b", "x" * 5000, "a\nb")},
    **{f"bytes {size!r:.30}": changing("manifest.json", "files", "state.json", "bytes", to=size) for size in NOT_COUNTS},
}  # fmt: skip
COUNTS = ["step", "updates", "skipped", "tokens", "validated", "best_step", "saved", "metrics_bytes"]
STATES: dict[str, Callable[[Path], Any]] = {
    "no JSON": writing("state.json", "{"), "no text": writing("state.json", b"\xff\xfe{}"), "deep": writing("state.json", DEEP),
    "a list": writing("state.json", "[]"), "empty": writing("state.json", "{}"),
    **{f"no {key}": changing("state.json", key, drop=True) for key in (*COUNTS, "best", "loader", "identity")},
    **{f"{key} {value!r}": changing("state.json", key, to=value) for key in COUNTS for value in NOT_COUNTS
       if (key, value) != ("validated", -1)},  # which is before the first validation
    "validated -2": changing("state.json", "validated", to=-2),
    **{f"best {value!r}": changing("state.json", "best", to=value) for value in ("1", float("nan"), float("inf"), [], {}, 10**400)},
    **{f"{key} {value!r}": changing("state.json", key, to=value) for key in ("loader", "identity") for value in (None, 3, "x", [])},
    **{f"{key} {value!r}": changing("state.json", "loader", key, to=value) for key in ("epoch", "row") for value in NOT_COUNTS},
    "data a list": changing("state.json", "loader", "data", to=[]), "more updates than steps": changing("state.json", "updates", to=9),
}  # fmt: skip


def test_resume_skips_a_checkpoint_with_a_false_manifest(try_each):
    assert try_each(MANIFESTS, "auto") == dict.fromkeys(MANIFESTS, "step 6")


def test_a_requested_checkpoint_with_a_false_manifest_is_refused(try_each):
    assert_one_line_each(try_each(MANIFESTS, f"{{}}/{LAST}"))


def test_resume_skips_a_state_with_wrong_types(try_each):
    assert try_each(STATES, "auto") == dict.fromkeys(STATES, "step 6")


def optimizer(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = load_file(folder / OPTIMIZER)
        change(values)
        save_file(values, folder / OPTIMIZER)
        seal(folder)

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / OPTIMIZER).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        words = json.dumps(entries).encode()
        (folder / OPTIMIZER).write_bytes(struct.pack("<Q", len(words)) + words + content[8 + length :])
        seal(folder)

    return spoil


def first(values: dict[str, Any]) -> str:
    return next(key for key in values if key.startswith("exp_avg/"))


def rename(to: str) -> Callable[[Path], None]:
    return optimizer(lambda values: values.update({to: values.pop(first(values))}))


def reshape(values: dict[str, torch.Tensor]) -> None:
    values[first(values)] = values[first(values)].flatten()


def overlap(values: dict[str, torch.Tensor]) -> None:
    """Store the first row of a rectangle twice and its last not at all, with the same number of elements."""
    key, value = next((key, value) for key, value in values.items() if len(value) > 1)
    name, rows, columns = re.fullmatch(r"(.+)\[(\d+):\d+(,\d+:\d+\])", key).groups()
    del values[key]
    values[f"{name}[{rows}:{int(rows) + len(value) - 1}{columns}"] = value[:-1].clone()
    values[f"{name}[{rows}:{int(rows) + 1}{columns}"] = value[:1].clone()


LIES: dict[str, Callable[[Path], Any]] = {
    "no header": writing(OPTIMIZER, b"\1"), "endless header": writing(OPTIMIZER, struct.pack("<Q", 2**63) + b"{}"),
    "deep header": writing(OPTIMIZER, struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "header a list": writing(OPTIMIZER, struct.pack("<Q", 2) + b"[]"),
    "offsets overlap": header(lambda entries: entries[list(entries)[2]].update(entries[list(entries)[1]])),
    "offsets beyond the end": header(lambda entries: entries[list(entries)[-1]].update(data_offsets=[2**60, 2**60 + 64])),
    "offsets negative": header(lambda entries: entries[list(entries)[-1]].update(data_offsets=[-64, 0])),
    "shape huge": header(lambda entries: entries[list(entries)[-1]].update(shape=[2**62, 2**62])),
    "no shape": header(lambda entries: entries[list(entries)[-1]].pop("shape")),
    "unknown type": header(lambda entries: entries[list(entries)[-1]].update(dtype="F7")),
    "a key that does not parse": rename("exp_avg"), "a key of another kind": rename("exp_avg/x[a:b,0:1]"),
    "a key that is too long": rename("exp_avg/x[0:" + "9" * 5000 + ",0:1]"), "a key with an end before": rename("exp_avg/x[4:0,0:4]"),
    "a name that the model has not": rename("exp_avg/model.nothing.lora_A.weight[0:4,0:32]"),
    "a row twice, another missing": optimizer(overlap),
    "a tensor missing": optimizer(lambda values: values.pop(first(values))),
    "not a number": optimizer(lambda values: values[first(values)].fill_(torch.nan)),
    "infinite": optimizer(lambda values: values[first(values)].view(-1)[-1:].fill_(torch.inf)),
    "half precision": optimizer(lambda values: values.update({first(values): values[first(values)].half()})),
    "one dimension": optimizer(reshape),
    "run file no TOML": writing("config.toml", "="), "run file no text": writing("config.toml", b"\xff\xfe"),
    "run file deep": writing("config.toml", "a = " + DEEP), "row beyond the epoch": changing("state.json", "loader", "row", to=10**9),
    "no identity": changing("state.json", "identity", to={}), "no data": changing("state.json", "loader", "data", to={}),
}  # fmt: skip


def test_every_false_content_is_refused_in_one_line(try_each):
    came = try_each(LIES, f"{{}}/{LAST}")
    for name, words in came.items():
        assert "Traceback" not in words, f"{name}: {words}"
        assert not words.startswith("step "), f"{name}: went on"
        assert "\n" not in words, f"{name}: {words}"
        assert len(words) < 700, f"{name}: {words}"


def test_a_malformed_saved_run_file_does_not_prevent_resuming(try_each):
    spoils = {"empty": writing("config.toml", ""), "data a number": writing("config.toml", "data = 3\n[lora]\nr = [1]")}
    assert try_each(spoils, f"{{}}/{LAST}") == dict.fromkeys(spoils, "step 8")


def test_a_huge_step_number_resumes_at_once(try_each):
    def spoil(folder: Path) -> None:
        for key in ("step", "updates"):
            changing("state.json", key, to=2**62)(folder)

    assert try_each({"huge": spoil}, f"{{}}/{LAST}") == {"huge": f"step {2**62}"}
