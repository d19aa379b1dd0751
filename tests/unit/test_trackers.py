"""A tracker that is missing is refused by name; one that fails or hangs gets no more lines and never ends the run."""

import importlib.util
import json
import threading
import tomllib
from pathlib import Path

import pytest

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.train import trackers
from megasft.train.metrics import Metrics
from megasft.train.trackers import TRACKERS, Background, TrackedRun, check, places

TRAIN = {"loss": 1.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 100.0}


def config(tmp_path="run", **logging):
    return RunConfig.from_dict({"logging": logging, "job": {"output_dir": str(tmp_path)}})


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_one_that_is_not_installed_is_refused_by_name_with_its_install_line(monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else object())
    check(config(to=["tensorboard"]))
    with pytest.raises(UserError, match=rf"\[logging\] to: {name} is not installed; pip install 'megasft\[{name}\]'"):
        check(config(to=["tensorboard", name]))
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert name in extras
    assert name in TRACKERS


def test_wandb_is_asked_for_a_key_unless_it_is_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb has no key"):
        check(config(to=["wandb"]))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check(config(to=["wandb"]))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here")
    with pytest.raises(UserError, match="wandb has no key"):
        check(config(to=["wandb"]))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check(config(to=["wandb"]))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(config(to=["wandb"]))


def test_a_tracker_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"tensorboard.*wandb.*mlflow.*trackio"):
        config(to=["comet"])


class Kept:
    """A tracker that keeps its lines, and fails at a step."""

    def __init__(self, fails_at=None, error=OSError("no\nnetwork")):
        self.lines, self.fails_at, self.error, self.closed = [], fails_at, error, False

    def log(self, line):
        if line.step == self.fails_at:
            raise self.error
        self.lines.append((line.kind, line.step))

    def close(self):
        self.closed = True


def raises():
    raise SystemExit("no key secret-word-1")


def run(tmp_path, *begins, steps=5):
    """The lines of a run with trackers that begin so, each named by its number."""
    made = []

    def start():
        made.extend(Background(str(i), begin) for i, begin in enumerate(begins))
        return list(made)

    metrics = Metrics(tmp_path, steps, trackers=start)
    for step in range(1, steps + 1):
        metrics.record("train", step, **TRAIN)
        for tracker in made:  # taken, or failed
            for _ in range(500):
                if tracker.failure or tracker._lines.empty():
                    break
                threading.Event().wait(0.01)
    metrics.close()
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_one_that_fails_is_an_event_and_the_others_get_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "secret-word-1")
    good, bad = Kept(), Kept(fails_at=3)
    lines = run(tmp_path, lambda: good, lambda: bad, raises)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    events = [line for line in lines if line["kind"] == "event"]
    reasons = sorted(event["reason"] for event in events)
    assert reasons == [
        "1 gets no more numbers, training continues (OSError: no network)",
        "2 gets no more numbers, training continues (SystemExit: no key ***)",
    ]
    assert "secret-word-1" not in capsys.readouterr().err
    assert {event["event"] for event in events} == {"tracker failed"}
    assert bad.lines[-1] == ("train", 2) or bad.lines[-1][0] == "event"
    assert [step for kind, step in good.lines if kind == "train"] == [1, 2, 3, 4, 5]
    assert good.closed


def test_one_that_fails_at_the_last_line_or_hangs_is_an_event_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)

    class Hangs(Kept):
        def close(self):
            threading.Event().wait(20)

    class Fails(Kept):
        def close(self):
            raise OSError("cannot finish")

    reasons = [line["reason"] for line in run(tmp_path, Hangs, Fails) if line["kind"] == "event"]
    assert [reason.partition("(")[2] for reason in reasons] == [
        "after 0 s it has not taken all lines)",
        "OSError: cannot finish)",
    ]


def test_one_that_takes_nothing_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    waits = threading.Event()
    tracker = Background("slow", lambda: waits.wait(20) and Kept())
    for _ in range(4):
        tracker.log(None)
    assert "3 lines" in tracker.failure
    waits.set()


def test_a_resumed_run_finds_the_names_that_trackers_gave_it(tmp_path):
    first = TrackedRun(config(tmp_path), 0, resumed=False)
    first.keep("wandb", "abc")
    first.keep("mlflow", "def")
    assert TrackedRun(config(tmp_path), 5, resumed=True).names == {"wandb": "abc", "mlflow": "def"}
    assert TrackedRun(config(tmp_path), 0, resumed=False).names == {}
    (tmp_path / "trackers.json").write_text("{")
    assert TrackedRun(config(tmp_path), 5, resumed=True).names == {}
    assert TrackedRun(config(tmp_path / "some-name"), 0, resumed=False).name == "some-name"
    assert TrackedRun(config(tmp_path, run_name="given"), 0, resumed=False).name == "given"


def test_the_end_of_a_run_says_where_each_tracker_shows_it(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:password@host:5000")
    shown = places(config("runs/a b", to=["trackio", "mlflow", "wandb", "tensorboard"], project="p"))
    assert shown == [
        ("Trackio", "trackio show --project p"), ("MLflow", "http://***@host:5000"), ("wandb", "wandb sync 'runs/a b/wandb'/offline-run-*"),
        ("TensorBoard", "tensorboard --logdir 'runs/a b/tensorboard'"),
    ]  # fmt: skip
    assert places(config(to=[])) == []
