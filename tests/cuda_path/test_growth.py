"""What a layer launches depends on its topology alone: not on the length of a sequence, the number of experts or layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A layer of the reference job, as committed, and of jobs at other places of `benchmarks/growth.py`'s axes."""
    path = tmp_path_factory.mktemp("growth") / "layers.json"
    subprocess.run([sys.executable, "benchmarks/growth.py", "--flat", path], cwd=ROOT, check=True, capture_output=True)
    committed = json.loads((ROOT / "benchmarks" / "kernel_counts.json").read_text())
    return json.loads(path.read_text()) | {"job": committed["reference job, TP=2 x DP=2"]["a layer"]}


@pytest.mark.parametrize("changed", ["16,384 tokens", "8 experts", "8 experts, a third layer"])
def test_launches_collectives_and_waits_of_a_layer_do_not_grow(layers, changed):
    found, job = layers[changed], layers["job"]
    assert job["kernels"] > 100
    assert found["kernels by operator"] == job["kernels by operator"]
    assert found["sent"].keys() == job["sent"].keys()
    assert found["host waits"] == job["host waits"] == {}


def test_bytes_and_memory_grow_with_length_no_faster_than_tokens(layers):
    longer, job = layers["16,384 tokens"], layers["job"]
    assert job["bytes"] < longer["bytes"] < 4 * job["bytes"]
    assert sum(longer["sent"].values()) < 4 * sum(job["sent"].values())
    assert longer["peak"] < 4 * job["peak"]


def test_experts_cost_their_weights_and_no_product(layers):
    few, job = layers["8 experts"], layers["job"]
    assert few["flops"] == pytest.approx(job["flops"], rel=0.01)  # the router's product grows with them
    assert few["bytes"] < job["bytes"] < 2 * few["bytes"]


def test_a_third_layer_is_as_the_second(layers):
    assert layers["8 experts, a third layer"] == layers["8 experts"]
