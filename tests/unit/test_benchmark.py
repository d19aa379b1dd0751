import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from megasft.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's figures and workloads; scripts import them from their own folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import steps
    import workload

    together = ModuleType("benchmarks")
    vars(together).update(vars(steps) | vars(workload))
    return together


def test_trains_alike_beside_transformers_and_writes_the_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/throughput.py", "--preset", "tiny", "--dtype", "fp32", "--against", "hf"]
    command += ["--steps", "2", "--warmup", "1", "--threads", "1", "--supervised", "0.5", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "losses agree" in done.stdout

    figures = json.loads(file.read_text())
    machine = figures["machine"]
    assert (machine["dtype"], machine["threads_per_rank"], machine["torch"]) == ("fp32", 1, version("torch"))
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert figures["tokens_per_step"] == 64
    assert figures["flops_per_step"]["model"] > 0
    assert figures["gemm_flops_per_second"]
    assert figures["limit_seconds"] > 0
    assert figures["speed_ratio"]["min"] <= figures["speed_ratio"]["median"] <= figures["speed_ratio"]["max"]
    ours, theirs = figures["sides"]["megasft"], figures["sides"]["transformers + peft, grouped_mm"]
    for side in (ours, theirs):
        assert len(side["losses"]) == 3
        assert side["losses"][0] != side["losses"][-1]
        assert side["tokens_per_second"] == pytest.approx(64 / side["step_seconds"]["median"])
        assert 0 < side["optimizer_seconds"] < side["step_seconds"]["max"]
        assert side["kept_bytes"] > 0
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)


def test_sides_that_train_differently_are_detected(benchmarks: ModuleType) -> None:
    def side(*losses: float) -> list:
        return [benchmarks.Step(loss, 1.0, 2.0, 0.5, 3.0) for loss in losses]

    assert benchmarks.compare(side(9.0, 8.0), side(9.0, 8.0007), 1, "fp32")["losses_agree"]
    assert not benchmarks.compare(side(9.0, 8.0), side(9.002, 8.0), 1, "fp32")["losses_agree"]  # in warm-up too
    assert not benchmarks.compare(side(9.0, 8.0), side(9.0, 8.2), 1, "bf16")["losses_agree"]
    assert not benchmarks.compare(side(9.0, float("nan")), side(9.0, 8.0), 1, "bf16")["losses_agree"]


def test_the_deterministic_option_reaches_the_run(benchmarks: ModuleType) -> None:
    for asked in (False, True):
        workload = benchmarks.Workload(benchmarks.PRESETS["tiny"], "fp32", steps=1, warmup=0, deterministic=asked)
        assert RunConfig.from_dict(workload.settings(".")).job.deterministic == asked


def test_frozen_flops_are_four_for_each_token_and_weight_it_meets(benchmarks: ModuleType) -> None:
    workload = benchmarks.Workload(benchmarks.PRESETS["small"], "bf16", steps=1, warmup=0, supervised=0.25)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(workload.shape.hf_config())
    layers = 0.0
    for name, parameter in model.named_parameters():
        met = 4 / 32 if ".experts." in name else 1  # four of 32 experts
        if parameter.dim() > 1 and ".layers." in name:
            layers += met * parameter.numel()
    flops = workload.flops(replicas=2)
    assert flops.frozen == 4 * layers * 2 * 1024
    assert flops.head == 4 * model.lm_head.weight.numel() * 2 * 256
    assert flops.model == flops.frozen + flops.lora + flops.attention + flops.head
