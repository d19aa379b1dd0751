"""A command's argument: a run directory, a run file, an adapter or a model."""

import json
from pathlib import Path

import pytest

from megasft.messages import UserError
from megasft.target import find_adapter, find_target


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run of `job.toml` with an adapter, best/ and a checkpoint, and its base model."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    folder = Path("runs/job")
    for name in ("adapter", "best", "checkpoints/step-000004"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (folder / "checkpoints" / "latest").symlink_to("step-000004")
    settings = '[job]\nmodel = "base"\noutput_dir = "runs/job"\n[lora]\nr = 4\n'
    for path in (Path("job.toml"), folder / "config.toml", folder / "checkpoints/step-000004/config.toml"):
        path.write_text(settings)
    return folder


@pytest.mark.parametrize("argument", ["runs/job", "runs/job/", "job.toml"])
def test_a_run_stands_for_the_adapter_it_trained_with_its_settings(run, argument):
    found = find_target(argument)
    assert (found.model, found.adapter) == ("base", "runs/job/adapter")
    assert found.config is not None
    assert found.config.lora.r == 4
    adapter = find_adapter(argument)
    assert (str(adapter.folder), adapter.config) == ("runs/job/adapter", found.config)


def test_a_run_that_was_moved_is_found_where_it_is(run):
    run.rename("elsewhere")
    assert find_target("elsewhere").adapter == "elsewhere/adapter"


@pytest.mark.parametrize("argument", ["runs/job/best", "runs/job/checkpoints/latest", "runs/job/adapter"])
def test_an_adapter_stands_for_itself_and_names_its_base(run, argument):
    found = find_target(argument)
    assert (found.model, found.adapter, found.config) == ("base", argument, None)
    assert find_adapter(argument).folder == Path(argument)


@pytest.mark.parametrize("argument", ["base", "Qwen/Qwen3-30B-A3B"])
def test_a_model_stands_for_itself(run, argument):
    assert find_target(argument) == find_target(argument, None)
    found = find_target(argument, "runs/job/best")
    assert (found.model, found.adapter, found.config) == (argument, "runs/job/best", None)


def test_of_an_unfinished_run_what_there_is_is_named(run):
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(
        UserError,
        match=r"^runs/job: has no adapter in runs/job/adapter, .*; name runs/job/best or runs/job/checkpoints/latest instead$",
    ):
        find_target("runs/job")
    assert find_target("runs/job", "runs/job/best").adapter == "runs/job/best"
    for name in ("best", "checkpoints/step-000004"):
        (run / name / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"; train it first$"):
        find_adapter("job.toml")


@pytest.mark.parametrize(
    ("argument", "adapter", "said"),
    [
        ("nope", None, "nope: no such folder, and not a hub id"),
        ("runs", None, "runs: is neither a run directory"),
        ("runs/job/best", "runs/job/adapter", "is an adapter, and so is --adapter runs/job/adapter"),
        ("nope.toml", None, "nope.toml: no such file"),
    ],
)
def test_anything_else_is_refused(run, argument, adapter, said):
    with pytest.raises(UserError, match=said):
        find_target(argument, adapter)


def test_an_adapter_of_no_known_base_needs_the_model(run):
    (run / "best" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model; name the model and --adapter runs/job/best"):
        find_target("runs/job/best")
    (run / "best" / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match="not a readable adapter configuration"):
        find_target("runs/job/best")
    with pytest.raises(UserError, match="no such folder; name a run directory"):
        find_adapter("nope")
