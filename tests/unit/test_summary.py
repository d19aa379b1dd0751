"""What a finished run prints: its numbers, and places and commands that can be copied."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from megasft.cli import app
from megasft.config.schema import RunConfig
from megasft.train.summary import Summary, print_summary

DONE = Summary(
    steps=1200, trained=1000, train_loss=1.23456789, validation_loss=2.5, best=2.25, seconds=50.04,
    tokens=123456, peak_memory_bytes=3 * 2**29,
)  # fmt: skip


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Print a summary on a terminal: (rows of the table, other lines by their names, all of it)."""

    def run(
        summary: Summary, folder: Path = tmp_path / "run", columns: int = 100
    ) -> tuple[dict[str, str], dict[str, str], str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        print_summary(summary, RunConfig.from_dict({"job": {"output_dir": str(folder)}}))
        text = capsys.readouterr().out
        rows = dict(re.findall(r"^│ (.+?) +│ (.+?) +│$", text, re.MULTILINE))
        places = dict(re.findall(r"^(\w[\w ]+): +(.+)$", text, re.MULTILINE))
        places.pop("megasft", None)  # the title
        return rows, places, text

    return run


def test_the_table_has_the_numbers_of_the_run(printed):
    rows, _, text = printed(DONE)
    assert rows == {
        "steps": "1,200",
        "training loss, mean of the last 10 steps": "1.234568",
        "validation loss": "2.500000",
        "best validation loss": "2.250000",
        "tokens": "123,456 (2,467 per second overall)",
        "time": "50.0 s",
        "peak memory of rank 0": "1.50 GiB",
    }
    assert text.splitlines()[0].rstrip() == "megasft: done"


def test_what_was_not_measured_is_left_out_or_said(printed):
    rows, _, _ = printed(replace(DONE, validation_loss=None, best=None))
    assert rows["validation loss"] == "not measured"
    assert "best validation loss" not in rows


def test_a_run_that_was_finished_before_reports_no_loss_and_no_tokens_of_this_launch(printed):
    rows, places, _ = printed(replace(DONE, trained=0, train_loss=None, tokens=0, seconds=0.3))
    assert rows["steps"] == "1,200 (all of them in an earlier launch)"
    assert not {"training loss, mean of the last 10 steps", "tokens", "time"} & rows.keys()
    assert rows["best validation loss"] == "2.250000"
    assert "adapter" in places


def test_places_and_commands_are_whole_on_a_narrow_terminal_and_name_what_is_there(printed, tmp_path):
    folder = tmp_path / ("deep/" * 20) / "a run [bold]"
    _, places, _ = printed(DONE, folder, columns=80)
    assert places["adapter"] == str(folder / "adapter")
    assert places["metrics"] == str(folder / "metrics.jsonl")
    assert "best adapter" not in places
    (folder / "best").mkdir(parents=True)
    assert printed(DONE, folder)[1]["best adapter"] == str(folder / "best")


def test_the_commands_it_names_are_commands_that_take_these_arguments(printed, tmp_path):
    folder = tmp_path / "a run"
    _, places, _ = printed(DONE, folder)
    assert shlex.split(places["TensorBoard"]) == ["tensorboard", "--logdir", str(folder / "tensorboard")]
    commands = [shlex.split(line) for line in places.values() if line.startswith("megasft ")]
    assert [command[1] for command in commands] == ["dashboard", "generate", "merge"]
    for _, name, *arguments in commands:
        command = typer.main.get_command(app).commands[name]
        given = command.make_context(name, list(arguments)).params  # refuses what the command does not take
        assert all(argument in " ".join(map(str, given.values())) for argument in arguments)
        assert str(folder) in " ".join(arguments)
