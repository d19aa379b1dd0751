"""What a GPU would run in a layer of the reference job and of five others, held to `benchmarks/kernel_counts.json` exactly."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megasft.config.schema import load_config
from megasft.model.shape import RELEASED
from megasft.plan.job import Job
from megasft.plan.memory import memory
from megasft.plan.time import KERNELS

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads((ROOT / "benchmarks" / "kernel_counts.json").read_text())
REMEDY = "if that is meant, run `python benchmarks/kernel_counts.py --write` and say so in docs/performance.md"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "counted.json"
    subprocess.run(
        [sys.executable, "benchmarks/kernel_counts.py", "--json", path], cwd=ROOT, check=True, capture_output=True
    )
    return json.loads(path.read_text())


@pytest.mark.parametrize("part", ["a layer", "the rest"])
@pytest.mark.parametrize("name", COMMITTED)
def test_kernels_bytes_waits_collectives_and_memory_are_as_committed(counted, name, part):
    found, committed = counted[name][part], COMMITTED[name][part]
    assert len(committed["kernels by operator"]) > 10
    changed = {key: (committed[key], found[key]) for key in committed if found[key] != committed[key]}
    assert not changed, f"{name}, {part}: (committed, counted) {changed}; {REMEDY}"


def test_the_plan_counts_launches_as_they_are():
    """Of attention and of an MLP that run again, too: with selective recomputation attention does not."""
    for four_bits, name in enumerate(("reference job, TP=2 x DP=2", "reference job in 4 bits")):
        assert sum(KERNELS[bool(four_bits)]) == COMMITTED[name]["a layer"]["kernels"]
    forward, _, mlp, backward = KERNELS[False]
    selective = COMMITTED["reference job, selective recomputation"]["a layer"]["kernels"]
    assert forward + mlp + backward == selective


def test_the_plan_knows_to_the_byte_what_selective_recomputation_keeps_of_a_layer():
    job = Job.of(load_config(ROOT / "configs" / "qwen3_coder_30b.toml"), RELEASED["Qwen3-Coder-30B-A3B"], 4)
    selective, full = (
        memory(replace(job, recompute=kept)).moments["loss head"]["saved activations"] for kept in ("selective", True)
    )
    counted = [
        COMMITTED[name]["a layer"]["peak"]
        for name in ("reference job, selective recomputation", "reference job, TP=2 x DP=2")
    ]
    assert job.tokens == 4096
    assert (selective - full) / len(job.layers) == counted[0] - counted[1] > 0


def test_the_reference_job_stays_below_its_limits():
    layer = COMMITTED["reference job, TP=2 x DP=2"]["a layer"]
    assert layer["kernels"] <= 120
    assert layer["bytes"] <= 7.5e9
    assert not layer["host waits"]
