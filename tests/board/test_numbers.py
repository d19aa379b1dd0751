"""Lines of metrics.jsonl to curves: nothing is lost on the way, and memory does not grow with the run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from megasft.board.content import FRAMES, Content
from megasft.board.curves import bin_width, curves
from megasft.board.run_folder import Runs
from megasft.board.server import application
from megasft.board.table import Row, Table
from megasft.board.tail import Tail
from megasft.messages import UserError
from tests.support.made_runs import make_run

ALL = (-1e300, 1e300)


def filled(steps: int, capacity: int, at_once: int = 7) -> Table:
    table = Table(capacity)
    rows = [Row(step, 10.0 * step, 0.5 * step, {"loss": float(step % 13)}) for step in range(1, steps + 1)]
    for first in range(0, steps, at_once):
        table.append(rows[first : first + at_once])
    return table


@pytest.mark.parametrize("steps", [1, 5, 16, 17, 100, 1000])
def test_a_full_table_keeps_mean_lowest_and_highest_of_every_row(steps):
    table = filled(steps, capacity=16)
    series = table.series("loss", "step")
    assert len(series.x) <= 17
    assert series.x[-1] == steps
    values = [step % 13 for step in range(1, steps + 1)]
    edges = [0, *(int(x) for x in series.x)]
    for start, end, mean, low, high in zip(edges, edges[1:], series.mean, series.low, series.high, strict=False):
        rows = values[start:end]
        assert (mean, low, high) == pytest.approx((np.mean(rows), min(rows), max(rows)), rel=1e-6)  # kept in fp32


def test_how_lines_arrive_does_not_change_a_table():
    one, other = (
        filled(333, 16, at_once=1).series("loss", "tokens"),
        filled(333, 16, at_once=333).series("loss", "tokens"),
    )
    for name in ("x", "mean", "low", "high"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


def test_a_column_that_comes_late_and_one_with_gaps_have_only_their_own_points():
    table = Table(8)
    table.append(
        [Row(step, 0, 0, {"a": 1.0} | ({"b": 2.0} if step > 15 and step % 2 else {})) for step in range(1, 31)]
    )
    series = table.series("b", "step")
    assert series.mean.tolist() == [2.0] * len(series.x)
    assert series.x[0] >= 16


def test_bins_stay_where_they_are_as_a_run_grows():
    content, grown = Content(), Content()
    records = [
        json.dumps({"kind": "train", "step": s, "time": float(s), "loss": math.sin(s)}).encode() for s in range(1, 1200)
    ]
    content.add(records[:1000])
    grown.add(records)
    width = bin_width(1, 1024, 100)
    before = curves(content, ["train.loss"], "step", ALL, width)["train.loss"]
    after = curves(grown, ["train.loss"], "step", ALL, width)["train.loss"]
    for name in ("x", "mean", "low", "high"):
        assert before[name][:-1] == after[name][: len(before[name]) - 1]
    tail = curves(grown, ["train.loss"], "step", ALL, width, after=before["x"][-1])["train.loss"]
    assert tail["x"] == [x for x in after["x"] if x >= before["x"][-1]]


def test_a_spike_of_one_step_is_seen_however_few_points_there_are():
    content = Content()
    content.add(
        [
            json.dumps({"kind": "train", "step": s, "time": 1.0, "loss": 9.0 if s == 777 else 1.0}).encode()
            for s in range(1, 20_000)
        ]
    )
    curve = curves(content, ["train.loss"], "step", ALL, bin_width(1, 20_000, 50))["train.loss"]
    assert len(curve["x"]) <= 51
    assert max(curve["high"]) == 9.0


def test_memory_does_not_grow_with_the_run():
    content = Content()
    for step in range(1, 3000):
        content.add(
            [json.dumps({"kind": "experts", "step": step, "time": 1.0, "tokens": [[step, 1], [2, 3]]}).encode()]
        )
        content.add(
            [json.dumps({"kind": "event", "step": step, "time": 1.0, "event": "skipped", "reason": "nan"}).encode()]
        )
    assert FRAMES // 2 <= len(content.frames) <= FRAMES
    gaps = np.diff([step for step, _ in content.frames])
    assert set(gaps.tolist()) == {gaps[0]}
    assert len(content.events) == 1000
    assert content.noted == 2999


def test_tokens_between_two_lines_are_counted():
    content = Content()
    content.add([json.dumps({"kind": "train", "step": s, "time": 1.0, "tokens": 100}).encode() for s in (10, 20, 30)])
    assert content.tokens == 3000
    line = {"kind": "train", "step": 40, "time": 1.0, "tokens": 100, "trained_tokens": 2718}
    content.add([json.dumps(line).encode()])
    assert content.tokens == 2718, "what a line knows is not estimated"


def test_a_line_without_its_end_waits_and_a_replaced_file_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert tail.read() == [b"one"]
    assert tail.read() == []
    with open(path, "ab") as file:
        file.write(b"o\nthree\n")
    assert tail.read() == [b"two", b"three"]
    path.write_bytes(b"other\nlines that are longer than before\n")
    assert tail.read()[0] == b"other"
    assert tail.restarts == 1


def test_a_long_run_is_shown_before_it_is_read(tmp_path):
    make_run(tmp_path / "run", steps=4000)
    runs = Runs([tmp_path])
    (run,) = runs.all()
    early = run.version
    assert run.content.step == 4000
    assert 100 < len(run.content.series("train.loss", "step").x) < 1000
    while runs.advance():
        pass
    assert run.version[0] != early[0]
    assert len(run.content.series("train.loss", "step").x) == 4000
    web = TestClient(application(runs, []), base_url="http://localhost")
    found = web.get("/api/curves", params={"plots": "loss", "runs": run.id, "points": 1e9}).json()
    assert len(found["runs"][run.id]["plots"]["loss"]["train.loss"]["x"]) <= 1001


def test_runs_are_found_in_parents_and_checkpoints_are_no_runs(tmp_path):
    make_run(tmp_path / "a" / "b" / "run", steps=2)
    other = make_run(tmp_path / "other", steps=2)
    (other / "checkpoints" / "step-1").mkdir(parents=True)
    for name in ("config.toml", "adapter_config.json"):
        (other / "checkpoints" / "step-1" / name).write_text("")
    assert [run.name for run in Runs([tmp_path]).all()] == ["a/b/run", "other"]
    assert [run.name for run in Runs([other, tmp_path]).all()] == ["a/b/run", "other"]
    with pytest.raises(UserError, match="no such folder"):
        Runs([Path("nowhere")])


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, finished=False)
    (folder / ".lock").touch()
    code = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    (run,) = Runs([tmp_path]).all()
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert run.state() == "stopped"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert run.state() == "running"
        holder.stdin.close()
    assert run.state() == "stopped"
