"""examples/serving/check_served.py: what vLLM and llama.cpp serve over HTTP are the tokens that megasft generates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megasft.adapters.export import export_adapter
from megasft.config.values import ALL_LINEAR, LINEAR_LAYERS
from tests.parity.reference import random_adapter, tiny_config, write_adapter
from tests.serving.conftest import PYTHON
from tests.support.world import make_world

ROOT = Path(__file__).parents[2]
R, ALPHA = 4, 12.0
# vLLM's attention on CPUs takes heads of 32 or more.
MODEL = {"head_dim": 32, "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_world(folder, **MODEL)
    config = tiny_config(vocab_size=264, mlp_only_layers=[], **MODEL)
    for name, layers in {"default": ALL_LINEAR, "router": LINEAR_LAYERS}.items():
        written = write_adapter(random_adapter(config, R, frozenset(layers)), folder / "written" / name, R, ALPHA)
        export_adapter(written, folder / name, base_model=str(folder / "model"))
    export_adapter(folder / "router", folder / "fused", "fused")
    return folder


def check(folder: Path, adapter: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples/serving/check_served.py", folder / adapter, folder / "train.jsonl"]
    command += ["--prompts", "3", "--max-new-tokens", "12", "--python", PYTHON, "--logs", folder / "logs", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)


def rows(said: str) -> list[list[str]]:
    """The cells of a printed table, without its head."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if line.startswith("│")]


def test_served_tokens_are_those_of_megasft(folder):
    done = check(folder, "default")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert [row[:2] for row in found] == [
        [server, model] for server in ("vLLM", "llama.cpp") for model in ("base", "base + adapter", "merged")
    ]
    # llama.cpp has no such tokenizer, and vLLM that of the model.
    assert [row[2] for row in found] == ["messages"] * 3 + ["token ids"] * 3
    assert {row[5] for row in found} == {"3 of 3"}


def test_an_adapter_with_the_router_in_the_fused_layout_is_served_by_llama_cpp_and_merged(folder):
    done = check(folder, "fused", "--only", "llama.cpp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[5] for row in rows(done.stdout)] == ["3 of 3"] * 3
    assert "which vLLM does not apply" in done.stderr


def test_a_server_that_fails_is_named_with_the_end_of_its_log(folder):
    config = folder / "model" / "config.json"
    whole = config.read_text()
    config.write_text(re.sub(r'"Qwen3MoeForCausalLM"', '"Unknown"', whole))
    try:
        done = check(folder, "default", "--only", "llama.cpp")
    finally:
        config.write_text(whole)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"megasft: llama.cpp with the adapter ended with exit code \d+ before it was ready; .*", last)
    assert "Unknown" in done.stderr
