"""Weights & Biases, MLflow and Trackio get the numbers of metrics.jsonl, once a run however often it is resumed, and no key.

All are offline or on this disk; what they got is read back by their own APIs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.world import make_world

ROOT = Path(__file__).parents[2]
KEYS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "HF_TOKEN": "hf_5ecretOfTheHubAccount",
    "MLFLOW_TRACKING_PASSWORD": "pass-w0rd-of-mlflow",
}
LOGGING = """
[logging]
to = ["tensorboard", "wandb", "mlflow", "trackio"]
project = "made-up"
run_name = "a <b>run</b>"
[tags]
team = "red"
trial = 3
"""

pytestmark = pytest.mark.trackers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tracked")


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "TRACKIO", "HF_"))
    }
    return kept | {
        "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TRACKIO_DIR": str(place / "trackio"), "XDG_CACHE_HOME": str(place / "cache"),
        "HOME": str(place), **more,
    }  # fmt: skip


def train(
    place: Path, *options: str, command: tuple[str, ...] = ("-m", "megasft", "train"), **more: str
) -> subprocess.CompletedProcess:
    arguments = [sys.executable, *command, "--config", "run.toml", *options]
    return subprocess.run(
        arguments, cwd=place, env=environment(place, **more), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def run(place):
    """A run of two steps that is resumed for two more, and what both launches printed."""
    run_file = make_world(place, steps=2)
    run_file.rename(place / "run.toml")
    (place / "run.toml").write_text((place / "run.toml").read_text() + LOGGING)
    (place / "keys.env").write_text(
        "# keys\n" + "\n".join(f"export {name}='{key}'" for name, key in KEYS.items()) + "\n"
    )
    said = ""
    for steps in (2, 4):
        done = train(place, "--env-file", "keys.env", "--set", f"hyperparameters.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert "tracker failed" not in said, said
    return place / "run", said


def curve(run: Path, kind: str, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], pytest.approx(line[name], rel=1e-9)) for line in lines if line["kind"] == kind]


def test_wandb_has_one_run_with_all_steps(run, place):
    folder, _ = run
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "a file for each launch"
    assert len({file.stem for file in files}) == 1, "of one run"
    records = []
    for file in files:
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
        read = subprocess.run(command, env=environment(place), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        records += map(json.loads, read.stdout.splitlines())
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    for kind in ("train", "validation"):
        found = [(item["step"], item[f"{kind}/loss"]) for item in items if f"{kind}/loss" in item]
        assert found == curve(folder, kind, "loss")
    assert any("norms/updates/lora_B/q_proj" in item for item in items)
    first = next(record["run"] for record in records if record["type"] == "run")
    assert (first["project"], first["display_name"], sorted(first["tags"])) == (
        "made-up",
        "a <b>run</b>",
        ["team=red", "trial=3"],
    )
    config = first["config"]["update"]
    assert config["lora"]["r"] == 4
    assert config["hyperparameters"]["max_steps"] == 2


def test_mlflow_has_one_run_with_all_steps(run, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{place / 'mlruns'}")
    experiment = client.get_experiment_by_name("made-up")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "a <b>run</b>"
    assert found.info.status == "FINISHED"
    assert (found.data.tags["team"], found.data.tags["trial"]) == ("red", "3")
    assert (found.data.params["lora.r"], found.data.params["job.seed"]) == ("4", "42")
    for kind, name in (("train", "loss"), ("train", "token_accuracy"), ("validation", "loss")):
        history = client.get_metric_history(found.info.run_id, f"{kind}/{name}")
        assert [(metric.step, metric.value) for metric in history] == curve(run[0], kind, name)
    assert "norms/updates/lora_B/q_proj" in found.data.metrics


def test_trackio_has_one_run_with_all_steps(run, place, monkeypatch):
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_runs('made-up'), S.get_logs('made-up', S.get_runs('made-up')[0]), "
        "S.get_run_config('made-up', S.get_runs('made-up')[0])], default=str))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(place), capture_output=True, text=True)
    runs, logs, config = json.loads(done.stdout.splitlines()[-1])
    assert runs == ["a <b>run</b>"]
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == curve(run[0], "train", "loss")
    assert config["lora"]["r"] == 4


def test_no_key_is_in_any_file_or_word_of_a_run(run, place):
    _, said = run
    for name, key in KEYS.items():
        assert key not in said, name
        holders = [
            str(path) for path in place.rglob("*")
            if path.is_file() and path.name != "keys.env" and key.encode() in path.read_bytes()
        ]  # fmt: skip
        assert not holders, name


def test_a_tracker_that_fails_is_an_event_and_the_run_ends_well(run, place):
    # Nobody listens there; the address has a password.
    done = train(
        place, "--set", 'logging.to=["mlflow", "tensorboard"]', "--set", 'job.output_dir="failing"', "--set", "hyperparameters.max_steps=2",
        MLFLOW_TRACKING_URI="http://someone:wordOfSecrecy@127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, (place / "failing" / "metrics.jsonl").read_text().splitlines()))
    (event,) = [line for line in lines if line.get("event") == "tracker failed"]
    assert event["reason"].startswith("mlflow gets no more numbers, training continues (")
    assert done.stderr.count("tracker failed") == 1
    assert "wordOfSecrecy" not in done.stderr + (place / "failing" / "metrics.jsonl").read_text()
    assert (place / "failing" / "adapter").is_dir()


def test_wandb_without_a_key_is_refused_before_ranks_start_and_the_script_reads_the_file_too(run, place):
    options = ("--set", 'logging.to="wandb"', "--set", 'job.output_dir="refused"')
    done = train(place, *options, WANDB_MODE="online")
    assert done.returncode == 2
    assert "[logging] to: wandb has no key; run `wandb login`, pass --env-file" in done.stderr
    assert not (place / "refused").exists()
    (place / "mode.env").write_text("WANDB_API_KEY=" + KEYS["WANDB_API_KEY"] + "\n")
    script = (str(ROOT / "tools" / "train.py"),)
    done = train(
        place,
        *options,
        "--env-file",
        "mode.env",
        "--set",
        "hyperparameters.max_steps=2",
        command=script,
        WANDB_MODE="offline",
    )
    assert done.returncode == 0, done.stderr
    assert list((place / "refused" / "wandb").glob("offline-run-*"))
