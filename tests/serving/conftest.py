"""A tiny model, megasft's adapters for it, what peft makes of them, and servers in an environment of their own."""

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megasft.adapters.export import export_adapter
from megasft.adapters.merge import merge_adapter
from megasft.config.values import ALL_LINEAR, LINEAR_LAYERS
from tests.parity.peft_adapters import base_model, loaded_by_peft
from tests.parity.reference import random_adapter, random_model, tiny_config, write_adapter

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-serving" / "bin" / "python"
R, ALPHA = 4, 12.0
NEW, TOP = 8, 20
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [100, 3, 55, 20], [42], list(range(30, 60))]
# A server's fp32 sums have another order than torch's. Over three layers that moves log-probabilities by some 1e-6;
# an adapter left out, or applied with another scaling, moves them by 0.1 to 3.
TOLERANCE = 5e-5
Answers = list[dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serving)


@dataclass(frozen=True)
class World:
    """A folder with base/, adapters that megasft exported, and merged/: the base with the adapter `full`."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def expected(self, name: str) -> tuple[list[list[int]], list[torch.Tensor]]:
        """transformers + peft: greedy tokens of each prompt, and log-probabilities [NEW, vocabulary] at each step."""
        model = base_model(self["base"]) if name == "base" else loaded_by_peft(self["base"], self[name])
        tokens, steps = [], []
        for prompt in PROMPTS:
            ids, found = list(prompt), []
            for _ in range(NEW):
                with torch.no_grad():
                    found.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
                ids.append(int(found[-1].argmax()))
            tokens.append(ids[len(prompt) :])
            steps.append(torch.stack(found))
        return tokens, steps

    def distance(self, answers: Answers, name: str) -> float:
        """The largest difference of a served log-probability from that of peft with the adapter `name`.

        Until the tokens part: after that the two answer different questions.
        """
        largest = 0.0
        for answer, tokens, steps in zip(answers, *self.expected(name), strict=True):
            assert len(answer["tokens"]) == len(answer["top"]) == NEW
            for served, token, top, want in zip(answer["tokens"], tokens, answer["top"], steps, strict=True):
                assert len(top) >= TOP
                found = torch.tensor(list(top.values()))
                largest = max(largest, float((found - want[[int(i) for i in top]]).abs().max()))
                if served != token:
                    break
        return largest

    def assert_served(self, answers: Answers | str, name: str) -> None:
        """The answers are those of transformers + peft with the adapter `name`: tokens, and log-probabilities."""
        assert not isinstance(answers, str), answers
        distance = self.distance(answers, name)
        print(f"{name}: largest difference in top-{TOP} log-probabilities {distance:.1e}")
        assert [answer["tokens"] for answer in answers] == self.expected(name)[0]
        assert distance < TOLERANCE


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    if not PYTHON.exists():
        pytest.fail("the servers are not installed; run `make test-serving`")
    folder = tmp_path_factory.mktemp("serving")
    # vLLM's attention on CPUs takes heads of 32 or more.
    config = tiny_config(mlp_only_layers=[], head_dim=32, architectures=["Qwen3MoeForCausalLM"])
    random_model(config).save_pretrained(folder / "base")
    targets = {
        "default": ALL_LINEAR,
        "full": LINEAR_LAYERS,
        "router": ("gate",),
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "experts": ("up_proj", "down_proj"),
    }
    for name, layers in targets.items():
        write_adapter(random_adapter(config, R, frozenset(layers)), folder / "written" / name, R, ALPHA)
        export_adapter(folder / "written" / name, folder / name, base_model=str(folder / "base"))
    export_adapter(folder / "full", folder / "without-router", without_router=True)
    export_adapter(folder / "default", folder / "fused", "fused")
    scale_by_root_of_rank(folder / "default", folder / "rslora")
    merge_adapter(folder / "base", folder / "full", folder / "merged")
    return World(folder)


def scale_by_root_of_rank(source: Path, out: Path) -> None:
    """The adapter `source` as one of peft's `use_rslora`: the same numbers, for alpha / sqrt(r) is its alpha / r."""
    export_adapter(source, out)
    path = out / "adapter_config.json"
    stabilized = {"use_rslora": True, "lora_alpha": ALPHA / math.sqrt(R)}
    path.write_text(json.dumps(json.loads(path.read_text()) | stabilized))


def ask(script: str, model: Path, adapters: dict[str, Path | None], folder: Path, **options: bool) -> dict[str, Any]:
    """Run `script` in the servers' environment; its answers to PROMPTS with each adapter, or its error, by name."""
    folder.mkdir()
    job = {
        "model": str(model), "prompts": PROMPTS, "new": NEW, "top": TOP, "answers": str(folder / "answers.json"),
        "adapters": {name: str(path) if path else None for name, path in adapters.items()}, **options,
    }  # fmt: skip
    ended = subprocess.run(
        [PYTHON, str(HERE / script)], input=json.dumps(job), capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder,
    )  # fmt: skip
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return json.loads((folder / "answers.json").read_text())
