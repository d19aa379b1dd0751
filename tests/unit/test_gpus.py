"""A run file that asks for GPUs is held against those that are here, before a rank is launched."""

import json
import os
import sys

import pytest
import torch

from megasft import cli, host, job
from megasft.checks import gpus
from megasft.config.schema import RunConfig
from megasft.launch import launcher
from megasft.messages import UserError
from megasft.model.shape import weights
from tests.parity.reference import tiny_config
from tests.support.world import make_world

# What torch 2.13 says, from the strings in libc10_cuda.so.
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading"
)
NONE = "No CUDA GPUs are available"


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without GPUs, wherever the test runs: `no_gpu(said, files, visible)`."""

    def be(said=NONE, files=(), visible=None):
        def init():
            raise RuntimeError(said)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(host.glob, "glob", lambda _: list(files))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    be()
    return be


def asking(**compute):
    return RunConfig.from_dict({"compute": compute})


@pytest.fixture
def h200s(monkeypatch):
    """Four GPUs of compute capability 9.0, of which this rank has one."""
    monkeypatch.setattr(host, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return monkeypatch


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


def test_a_run_file_without_gpus_runs_on_cpus():
    gpus.check_count(asking(), 4)
    gpus.check_count(asking(gpu_count=0, gpu_type="H200"), 4)
    gpus.check_kind(asking())


@pytest.mark.parametrize(
    ("compute", "key"), [({"gpu_count": 4}, "gpu_count = 4"), ({"gpu_type": "H200"}, 'gpu_type = "H200"')]
)
def test_a_run_file_for_gpus_is_refused_without(compute, key, no_gpu):
    message = refusal(gpus.check_count, asking(**compute), 1)
    assert message.startswith(f"[compute] {key}, but torch sees no GPU: there is no /dev/nvidia0: ")
    assert message.endswith("; --set compute.gpu_count=0 trains on CPUs")


@pytest.mark.parametrize(
    ("said", "files", "visible", "why"),
    [
        (TOO_OLD, ["/dev/nvidia0"], None, "the NVIDIA driver is too old: it is for CUDA 12.4, torch for 13.0; update it"),
        (NONE, ["/dev/nvidia0", "/dev/nvidia1"], "7", "CUDA_VISIBLE_DEVICES=7 names none of /dev/nvidia0, /dev/nvidia1; unset it"),
        (NONE, ["/dev/nvidia0"], "", "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs; unset it"),
        (NONE, ["/dev/nvidia0"], None, "torch says: No CUDA GPUs are available"),
        (NONE, [], "0", "there is no /dev/nvidia0: this machine has no GPU or no driver, or its container was started without GPUs"),
    ],
)  # fmt: skip
def test_the_reason_is_named(said, files, visible, why, no_gpu):
    no_gpu(said, files, visible)
    assert host.why_no_gpu() == why


def test_fewer_gpus_than_asked_for_or_than_ranks_are_refused(h200s):
    gpus.check_count(asking(gpu_count=4), 4)
    gpus.check_count(asking(gpu_count=2), 2)
    assert refusal(gpus.check_count, asking(gpu_count=8), 4).startswith(
        "[compute] gpu_count = 8, but torch sees 4 GPUs on this machine; set it to 4, "
    )
    assert refusal(gpus.check_ranks, 8).startswith("8 ranks on this machine, but torch sees 4 GPUs; ")
    assert refusal(gpus.check_count, asking(gpu_count=0), 1).startswith("[compute] gpu_count = 0 asks for CPUs, but ")


@pytest.mark.parametrize("wanted", ["H200", "h200", "NVIDIA H200", "4xH200", "nvidia-h200", "H200-SXM", "any"])
def test_another_spelling_of_the_gpu_is_taken(wanted, h200s):
    gpus.check_kind(asking(gpu_type=wanted))


@pytest.mark.parametrize("wanted", ["H100", "8xH100", "A100-80GB", "H200-80GB"])
def test_another_gpu_is_refused_with_its_name(wanted, h200s):
    message = refusal(gpus.check_kind, asking(gpu_type=wanted))
    assert (
        message
        == f"[compute] gpu_type = \"{wanted}\", but this GPU is a NVIDIA H200; --set compute.gpu_type='NVIDIA H200' takes it"
    )
    gpus.check_kind(asking(gpu_type="NVIDIA H200"))


@pytest.mark.parametrize(
    ("gpu", "bf16", "slow"),
    [
        (("NVIDIA H200", (9, 0)), True, None),
        (("NVIDIA B200", (10, 0)), True, None),
        (("NVIDIA H200", (9, 0)), False, "for float32"),
        (("NVIDIA A100-SXM4-80GB", (8, 0)), True, "for NVIDIA A100-SXM4-80GB (compute capability 8.0)"),
        (("NVIDIA RTX PRO 6000", (12, 0)), True, "for NVIDIA RTX PRO 6000 (compute capability 12.0)"),
    ],
)
def test_where_experts_loop_it_is_said(gpu, bf16, slow, h200s, capsys):
    h200s.setattr(host, "own_gpu", lambda: gpu)
    gpus.check_kind(RunConfig.from_dict({"hyperparameters": {"parallelism": {"bf16": bf16}}}))
    said = capsys.readouterr().err
    assert said.startswith(f"torch {torch.__version__} has no grouped GEMM {slow}: ") if slow else not said


def test_weights_are_those_of_the_model():
    """But for norms, which are vectors."""
    from transformers import Qwen3MoeForCausalLM

    config = tiny_config()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert weights(config) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_answers_of_a_large_model_on_cpus_are_announced(capsys, no_gpu):
    gpus.tell_if_slow(tiny_config())
    assert capsys.readouterr().err == ""
    gpus.tell_if_slow(tiny_config(hidden_size=2048, num_experts=128, moe_intermediate_size=768, num_hidden_layers=48))
    said = capsys.readouterr().err
    assert said.startswith("torch sees no GPU, so ")
    assert " billion weights answer on CPUs, slowly: there is no /dev/nvidia0: " in said


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """`answer(*arguments)`: what `megasft generate` of a tiny model says before ranks are launched, and as they are."""
    make_world(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["megasft", "generate", str(tmp_path / "model"), "-p", "hi", *arguments])
        monkeypatch.setattr(launcher, "launch", lambda *_, **__: print("launched", file=sys.stderr))
        monkeypatch.setattr(launcher, "use_cores", lambda _: None)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().err.splitlines()

    return run


def test_more_ranks_than_gpus_do_not_answer(answer, h200s):
    h200s.setattr(torch.cuda, "device_count", lambda: 1)
    assert answer() == ["launched"]
    assert answer("--tensor-parallel", "2")[-1].startswith("megasft: 2 ranks on this machine, but torch sees 1 GPU; ")


def test_the_command_that_answers_says_if_it_will_be_slow(answer, no_gpu, monkeypatch):
    assert answer() == ["launched"]
    monkeypatch.setattr(gpus, "CPU_WEIGHTS", 1e3)
    slow, launched = answer()
    assert slow.endswith(" billion weights answer on CPUs, slowly: " + host.why_no_gpu())
    assert launched == "launched"


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`train(*settings)`: what `megasft train` says as it refuses a tiny job, or "launched"."""
    run_file = make_world(tmp_path)

    def run(*settings):
        sets = [word for setting in settings for word in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["megasft", "train", "--config", str(run_file), *sets])
        monkeypatch.setattr(launcher, "launch", lambda *_: print("launched", file=sys.stderr))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_the_command_refuses_before_it_launches(train, no_gpu):
    assert train() == "launched"
    assert train("compute.gpu_count=1").startswith("megasft: [compute] gpu_count = 1, but torch sees no GPU: ")


def test_a_run_file_that_asks_for_cpus_hides_the_gpus(train, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert train("compute.gpu_count=0") == "launched"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_rank_of_torchrun_refuses_before_it_joins_the_others(no_gpu, h200s):
    h200s.setattr(host, "CUDA", False)
    assert "but torch sees no GPU" in refusal(job.initialize, asking(gpu_count=4))
    h200s.setattr(host, "CUDA", True)
    h200s.setattr(host, "prepare", lambda: None)
    assert "but this GPU is a NVIDIA H200" in refusal(job.initialize, asking(gpu_type="H100"))


def test_a_large_model_is_not_trained_on_cpus_unless_the_run_file_says_so(train, tmp_path, no_gpu):
    path = tmp_path / "model" / "config.json"
    large = {"hidden_size": 2048, "num_local_experts": 128, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    path.write_text(json.dumps(json.loads(path.read_text()) | large))
    said = train()
    assert " has 29." in said
    assert " billion weights, but torch sees no GPU: there is no /dev/nvidia0: " in said
    assert said.endswith("; --set compute.gpu_count=0 trains on CPUs")
    assert train("compute.gpu_count=0") == "launched"


@pytest.mark.parametrize(
    ("set_by_user", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_a_rank_on_a_gpu_allocates_in_segments_that_grow_unless_the_user_chose(set_by_user, after, h200s):
    """Before the GPU is touched. torch reads either variable at its first allocation, not when it is imported."""
    at_set_device = {}

    def variables():
        return {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}

    for name in variables():
        h200s.delenv(name)
    for name, value in set_by_user.items():
        h200s.setenv(name, value)
    h200s.setattr(torch.cuda, "set_device", lambda _: at_set_device.update(variables()))
    host.prepare.__wrapped__()
    h200s.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert at_set_device == after
