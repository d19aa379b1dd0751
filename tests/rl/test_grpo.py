"""An adapter of megasft goes through TRL's GRPO and comes back: examples/rl/grpo.py in an environment of its own."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasft.adapters.adapter_file import AdapterFile
from megasft.adapters.export import export_adapter
from megasft.adapters.merge import merge_adapter
from megasft.config.values import ALL_LINEAR, LINEAR_LAYERS
from tests.parity.peft_adapters import DOWN, GATE_UP, base_model, loaded_by_peft, logits, save_trained_by_peft
from tests.parity.reference import random_adapter, tiny_config, write_adapter
from tests.support import on_ranks
from tests.support.world import make_world

pytestmark = pytest.mark.rl
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-rl" / "bin" / "python"
EXAMPLE = ROOT / "examples" / "rl"
R, ALPHA, VOCABULARY = 4, 12.0, 264
ATTENTION, EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# How the adapter is made, what it adapts, options of grpo.py, and how often its r is that of the adapter given.
KINDS = {
    "all-linear": ("megasft", ALL_LINEAR, [], 1),
    "with the router": ("megasft", LINEAR_LAYERS, [], 1),
    "attention": ("megasft", ATTENTION, [], 1),
    "experts": ("megasft", EXPERTS, [], 1),
    "a reference for KL": ("megasft", ALL_LINEAR, ["--beta", "0.1"], 1),
    "gate and up trained freely": ("megasft", ALL_LINEAR, ["--no-separate"], 2),
    "rslora on attention": ("rslora", ATTENTION, [], 1),
    "rslora on experts, made by peft": ("peft", EXPERTS, [], 1),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    if not PYTHON.exists():
        pytest.fail("TRL is not installed; run `make test-rl`")
    folder = tmp_path_factory.mktemp("rl")
    make_world(folder, steps=1)
    return folder


def start_adapter(world: Path, how: str, targets: tuple[str, ...], folder: Path) -> Path:
    """An adapter with random values in `folder`, in the layout that megasft writes, or as peft saves it."""
    if how == "peft":
        settings = {"target_modules": [], "target_parameters": [GATE_UP, DOWN], "use_rslora": True}
        save_trained_by_peft(world / "model", folder, **settings)
        return folder
    config = tiny_config(vocab_size=VOCABULARY, mlp_only_layers=[])
    written = write_adapter(random_adapter(config, R, frozenset(targets)), folder / "written", R, ALPHA)
    export_adapter(written, folder / "exported", base_model=str(world / "model"))
    if how == "rslora":
        with_root_of_rank(folder / "exported")
    return folder / "exported"


def with_root_of_rank(adapter: Path) -> None:
    """Let the same numbers be scaled by alpha / sqrt(r)."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True, "lora_alpha": ALPHA / math.sqrt(R)}))


def grpo(world: Path, adapter: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [PYTHON, EXAMPLE / "grpo.py", world / "model", adapter, world / "train.jsonl", "--out", out]
    small = ["--steps", "2", "--group", "4", "--max-new-tokens", "12", "--learning-rate", "1e-2"]
    return subprocess.run([*command, *small, *options], capture_output=True, text=True, timeout=600)


def settings_for(world: Path, targets: tuple[str, ...], r: int, alpha: float, adapter: Path) -> dict:
    return {
        "job": {"model": str(world / "model"), "output_dir": str(world / "run"), "init_adapter": str(adapter)},
        "lora": {"r": r, "alpha": alpha, "dropout": 0.0, "target_modules": list(targets)},
        "data": {"topology": {"tensor_parallel": 2, "data_parallel": 1}},
        "hyperparameters": {
            "per_device_batch": 4, "learning_rate": 1e-2, "max_steps": 1, "parallelism": {"bf16": False},
        },
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_through_grpo_and_back(ranks, world, tmp_path, kind):
    how, targets, options, factor = KINDS[kind]
    start, end = start_adapter(world, how, targets, tmp_path), tmp_path / "grpo"
    done = grpo(world, start, end, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    moved = re.search(r"(\d+) of (\d+) tensors of the adapter moved", done.stdout)
    assert moved
    assert moved[1] == moved[2], "A or B of some layer was not trained"
    if factor == 1:
        before, after = (AdapterFile(folder) for folder in (start, end))
        assert {layer: pair.r for layer, pair in before.pairs(True).items()} == {
            layer: pair.r for layer, pair in after.pairs(True).items()
        }, "the adapter came back with other ranks"
        for layer, pair in after.pairs(True).items():
            was = before.pairs(True)[layer]
            assert not torch.equal(before.tensor(was.A), after.tensor(pair.A)), layer
            assert not torch.equal(before.tensor(was.B), after.tensor(pair.B)), layer

    r, alpha = re.search(r"--set lora\.r=(\d+) --set lora\.alpha=(\S+)", done.stdout).groups()
    assert int(r) == factor * R
    samples = on_ranks.random_samples(VOCABULARY, [24] * 4)
    theirs = logits(loaded_by_peft(world / "model", end), samples)
    assert (theirs - logits(loaded_by_peft(world / "model", start), samples)).abs().max() > 1e-2

    settings = settings_for(world, targets, int(r), float(alpha), end)
    ours = ranks(2, on_ranks.logits, settings, samples)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ranks(2, on_ranks.loss_curve, settings, samples, 1, str(tmp_path / "again"))
    trained = logits(loaded_by_peft(world / "model", tmp_path / "again"), samples)
    assert (trained - theirs).abs().max() > 1e-3
    merge_adapter(world / "model", end, tmp_path / "merged")
    torch.testing.assert_close(logits(base_model(tmp_path / "merged"), samples), theirs, rtol=1e-5, atol=1e-5)


def megasft(*arguments: object, folder: Path) -> str:
    command = [sys.executable, "-m", "megasft", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_goes_through_grpo_and_on_by_the_commands_that_are_printed(world, tmp_path):
    megasft("train", "--config", world / "job.toml", folder=tmp_path)
    done = grpo(world, world / "run" / "adapter", tmp_path / "grpo")
    assert done.returncode == 0, done.stdout + done.stderr
    options = re.search(r"^to continue in megasft: (.*)$", done.stdout, re.MULTILINE)[1].split()
    again = ["--set", f"job.output_dir={tmp_path / 'again'}"]
    megasft("train", "--config", world / "job.toml", *options, *again, folder=tmp_path)
    for adapter in (tmp_path / "grpo", tmp_path / "again" / "adapter"):
        megasft("generate", adapter, "--prompt", "what?", "--max-new-tokens", "4", folder=tmp_path)
    megasft("merge", tmp_path / "grpo", tmp_path / "merged", folder=tmp_path)


IN_TRL = """
import json, sys
import typer
from typer.testing import CliRunner
import grpo
app = typer.Typer()
app.command()(grpo.main)
job = json.load(sys.stdin)
refusals = []
for arguments in job["refused"]:
    done = CliRunner().invoke(app, arguments)
    refusals.append([done.exit_code, done.stderr])
called = [grpo.calls_one_of(answer, ["look", "go"]) for answer in job["answers"]]
agreement = grpo.agreement(["abc", "", "abc"], ["abc", "abc", "xyz"])
tokenizer = grpo.AutoTokenizer.from_pretrained(job["model"])
turns = [grpo.last_short_prompt(tokenizer, job["turns"], job["tools"], longest) for longest in (20, 60, 600)]
print(json.dumps({"refusals": refusals, "called": called, "agreement": agreement, "turns": turns}))
"""
CALLS = {
    '<tool_call>\n{"name": "go", "arguments": {"to": "x"}}\n</tool_call>': True,
    'I go.<tool_call>{"name": "go", "arguments": {}}</tool_call><tool_call>{"name": "look", "arguments": {}}</tool_call>': True,
    '<tool_call>{"name": "fly", "arguments": {}}</tool_call>': False,
    '<tool_call>{"name": "go", "arguments": "x"}</tool_call>': False,
    '<tool_call>{"name": "go", "arguments": {}}</tool_call><tool_call>{"name": </tool_call>': False,
    '<tool_call>["go"]</tool_call>': False,
    '<tool_call>{"name": "go", "arguments": {}}': False,
    "go": False,
}


def test_mistakes_are_refused_in_one_line_and_rewards_are_what_they_say(world, tmp_path):
    rslora = start_adapter(world, "rslora", EXPERTS, tmp_path)
    good = start_adapter(world, "megasft", ATTENTION, tmp_path / "good")
    full, asked, broken = tmp_path / "full", tmp_path / "asked.jsonl", tmp_path / "broken.jsonl"
    full.mkdir()
    (full / "file").touch()
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}))
    broken.write_text("{}\n")
    model, data, out = world / "model", world / "train.jsonl", tmp_path / "out"
    refused = {
        "not a folder with a PEFT adapter": (model, model, data, out),
        "writes the same adapter without use_rslora": (model, rslora, data, out),
        "holds no config.json": (world, good, data, out),
        "holds files already": (model, good, data, full),
        "cannot be read (No such file": (model, good, tmp_path / "none", out),
        "asked.jsonl: no answer of the assistant has a prompt of at most 512 tokens": (model, good, asked, out),
        "broken.jsonl:1: not a conversation": (model, good, broken, out),
    }
    arguments = [[*map(str, paths[:3]), "--out", str(paths[3])] for paths in refused.values()]
    turns = [{"role": role, "content": role * 2} for role in ("user", "assistant", "user", "assistant", "user")]
    tools = [{"type": "function", "function": {"name": "look"}}]
    job = json.dumps(
        {"refused": arguments, "answers": list(CALLS), "model": str(model), "turns": turns, "tools": tools}
    )
    done = subprocess.run([PYTHON, "-c", IN_TRL], input=job, cwd=EXAMPLE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for words, (code, line) in zip(refused, said["refusals"], strict=True):
        assert code == 2
        assert words in line
        assert line.startswith("grpo.py: ")
        assert line.count("\n") == 1
    assert said["called"] == list(CALLS.values())
    assert said["agreement"] == [1.0, 0.0, 0.0]
    first = "<|im_start|>user\nuseruser<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}assistantassistant<|im_end|>\n{first}"
    assert [turn and turn["prompt"] for turn in said["turns"]] == [None, first, second]
    assert {(turn["reference"], *turn["tools"]) for turn in said["turns"][1:]} == {("assistantassistant", "look")}

    # The remedy that is printed gives peft the policy that was trained.
    megasft("export", rslora, tmp_path / "plain", folder=tmp_path)
    samples = on_ranks.random_samples(VOCABULARY, [24] * 4)
    merge_adapter(model, rslora, tmp_path / "merged")
    plain = logits(loaded_by_peft(model, tmp_path / "plain"), samples)
    torch.testing.assert_close(plain, logits(base_model(tmp_path / "merged"), samples), rtol=1e-5, atol=1e-5)
