"""What a run records of itself is what happened: in its steps, in metrics.jsonl, in TensorBoard's curves, at its end."""

import json
import time
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasft.messages import UserError
from megasft.train.trainer import Trainer
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
SLEPT = 0.05  # seconds in each step beside those of the computation
STEPS = 12  # more than the 10 whose loss the summary tells
VALIDATED = [0, 5, 10, STEPS]


@pytest.fixture
def settings(tmp_path):
    random_model(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path / "base")

    def make(**hyperparameters):
        return {
            "job": {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "run")},
            "lora": {"r": 4},
            "training": {"validation": {"enabled": True, "eval_steps": 5, "at_start": True}},
            "hyperparameters": {"learning_rate": 1e-2, "warmup_ratio": 0.5, "parallelism": {"bf16": False}, **hyperparameters},
            "logging": {"experts_every_steps": 4},
        }  # fmt: skip

    return make


def timed_steps(settings, samples, steps):
    """(record, seconds by the clock of the caller) of each step; the first waits for its data as long again."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    compute, cut = trainer._compute, trainer._cut
    trainer._compute = lambda *args, **named: (time.sleep(SLEPT), compute(*args, **named))[1]
    trainer._cut = lambda *args: (time.sleep(SLEPT), cut(*args))[1]
    found = []
    for _ in range(steps):
        started = time.monotonic()
        record = trainer.train_step()
        found.append((record, time.monotonic() - started))
    return found


def test_a_record_has_the_time_of_the_step_and_the_tokens_of_all_ranks_in_it(ranks, settings):
    samples = on_ranks.random_samples(203, LENGTHS)
    fed, supervised = sum(LENGTHS) - len(LENGTHS), sum(int(mask.sum()) for _, mask in samples)
    for found in ranks(2, timed_steps, settings(per_device_batch=2, max_steps=4), samples, 4):
        for record, elapsed in found:
            assert SLEPT <= record["seconds"] <= elapsed
            assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=1e-12)
            assert 0 <= record["data_wait"] <= record["seconds"]
        records = [record for record, _ in found]
        assert records[0]["data_wait"] >= SLEPT
        assert [record["epoch"] for record in records] == [0.5, 1.0, 1.5, 2.0]
        assert sum(record["tokens"] for record in records) == 2 * fed
        assert sum(record["supervised_tokens"] for record in records) == 2 * supervised
        assert [record["lr"] for record in records] == pytest.approx([0.0, 5e-3, 1e-2, 5e-3], rel=1e-12)


def fitted(settings, samples, held_out):
    """The summary of a run, what `train_step` gave in it, the seconds it took, and the time before and after."""
    config, topology, model = on_ranks.start(settings)
    validation = on_ranks.as_samples(held_out) if held_out else None
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples), validation)
    step, records = trainer.train_step, []
    trainer.train_step = lambda: (records.append(step()), records[-1])[1]
    began, started = time.time(), time.monotonic()
    summary = trainer.fit()
    return summary, records, time.monotonic() - started, (began, time.time())


def test_lines_curves_and_summary_of_a_run_are_those_of_its_steps(ranks, settings, tmp_path):
    samples = on_ranks.random_samples(203, LENGTHS)
    held_out = on_ranks.random_samples(203, [12, 7, 30], seed=5)
    summary, records, seconds, (began, ended) = ranks(1, fitted, settings(max_steps=STEPS), samples, held_out)[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "validation", "experts", "norms", "devices", "checkpoint"}
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "validation", "experts")}
    assert [line["step"] for line in of["train"]] == list(range(1, STEPS + 1))
    for line, record in zip(of["train"], records, strict=True):
        assert record.items() <= line.items()
    times = [began - 1e-3, *(line["time"] for line in lines), ended + 1e-3]  # lines have milliseconds
    assert times == sorted(times)
    assert [line["step"] for line in of["validation"]] == VALIDATED
    assert {line["tokens"] for line in of["validation"]} == {sum(int(mask.sum()) for _, mask in held_out)}
    assert [line["step"] for line in of["experts"]] == [4, 8, STEPS]

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0, "histograms": 0}).Reload()
    for kind in ("train", "validation"):
        for name in of[kind][0].keys() - {"kind", "step", "time"}:
            curve = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
            # TensorBoard keeps fp32.
            assert curve == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in of[kind]], name
    assert {"train/loss", "train/tokens_per_second", "train/epoch", "validation/loss"} <= set(board.Tags()["scalars"])
    for event, line in zip(board.Histograms("experts/tokens"), of["experts"], strict=True):
        counts = [count for layer in line["tokens"] for count in layer]
        assert (event.step, event.histogram_value.num, event.histogram_value.max) == (
            line["step"],
            len(counts),
            max(counts),
        )

    losses = [record["loss"] for record in records]
    validated = [line["loss"] for line in of["validation"]]
    assert (summary.steps, summary.trained) == (STEPS, STEPS)
    assert summary.tokens == sum(record["tokens"] for record in records)
    assert summary.train_loss == pytest.approx(sum(losses[-10:]) / 10, rel=1e-12)
    assert (summary.validation_loss, summary.best) == (validated[-1], min(validated))
    assert len(set(validated)) == len(VALIDATED)
    assert sum(record["seconds"] for record in records) <= summary.seconds <= seconds
    assert summary.peak_memory_bytes > 2**26


def test_epochs_are_validated_at_their_ends_if_that_is_the_strategy(ranks, settings, tmp_path):
    by_epoch = settings(max_steps=STEPS) | {
        "training": {"validation": {"enabled": True, "evaluation_strategy": "epoch"}}
    }
    held_out = on_ranks.random_samples(203, [12, 7], seed=5)
    ranks(1, fitted, by_epoch, on_ranks.random_samples(203, LENGTHS[:5]), held_out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [5, 10, STEPS]


def test_a_run_without_validation_that_is_finished_trains_nothing_when_it_is_started_again(ranks, settings):
    without = settings(max_steps=2) | {"training": {}}
    samples = on_ranks.random_samples(203, LENGTHS)
    first, second = (ranks(1, fitted, without, samples, None)[0] for _ in range(2))
    assert (first[0].steps, first[0].trained, len(first[1])) == (2, 2, 2)
    assert (first[0].validation_loss, first[0].best) == (None, None)
    assert (second[0].steps, second[0].trained, second[0].tokens, second[0].train_loss) == (2, 0, 0, None)
    assert second[1] == []


def trained_at_rate_zero(settings, samples):
    """What a run says whose learning rate is 0 in every step."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.schedule = replace(trainer.schedule, peak=0.0)
    try:
        trainer.fit()
    except UserError as error:
        return str(error)
    return "done"


def test_an_adapter_that_would_change_nothing_is_never_called_done(ranks, settings, tmp_path):
    job = settings(per_device_batch=2, max_steps=2)
    for said in ranks(2, trained_at_rate_zero, job, on_ranks.random_samples(203, LENGTHS)):
        assert "every lora_B is zero" in said
        assert "learning_rate" in said
    assert not (tmp_path / "run" / "adapter").exists()
