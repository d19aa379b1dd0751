"""metrics.jsonl of a run that resumes: what was written after the checkpoint is taken back, except what stays true."""

import json

import pytest

from megasft.train.metrics import Metrics

TRAIN = {"loss": 1.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 100.0}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def killed(tmp_path):
    """A run that was killed in step 5, and the bytes of its metrics when its checkpoints of steps 1 to 3 were begun.

    The line of a checkpoint is written when the checkpoint is on disk, which is later.
    """
    metrics, lengths = Metrics(tmp_path, 10), {}
    for step in range(1, 5):
        metrics.record("train", step, **TRAIN)
        lengths[step] = metrics.length
        if step > 1:
            metrics.record("checkpoint", step - 1, path=f"step-{step - 1}")
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "checkpoint", "step": 2')
    return tmp_path, lengths


def test_lines_after_the_checkpoint_go_except_those_of_checkpoints_up_to_it(killed):
    folder, lengths = killed
    metrics = Metrics(folder, 10, 2, lengths[2])
    assert metrics.checkpoints == [1, 2]
    assert metrics.length == (folder / "metrics.jsonl").stat().st_size
    metrics.record("train", 3, **TRAIN)
    metrics.close()
    kinds = [(line["kind"], line["step"]) for line in lines(folder)]
    assert kinds == [("train", 1), ("train", 2), ("checkpoint", 1), ("checkpoint", 2), ("train", 3)]


def test_a_run_of_which_nothing_is_kept_begins_with_no_line(killed):
    folder, _ = killed
    metrics = Metrics(folder, 10, 3, 0)
    metrics.close()
    assert (metrics.checkpoints, metrics.length) == ([], 0)
    assert lines(folder) == []


def test_a_length_beyond_the_file_is_the_file(tmp_path):
    Metrics(tmp_path, 10).close()
    metrics = Metrics(tmp_path, 10, 3, 1000)
    metrics.record("train", 4, **TRAIN)
    metrics.close()
    assert metrics.length == (tmp_path / "metrics.jsonl").stat().st_size
    assert [line["step"] for line in lines(tmp_path)] == [4]
