"""The ways in that README and docs/ show, as a user takes them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.support.forked import Command
from tests.support.world import make_world

ROOT = Path(__file__).parents[1]


def run(command: list[str], cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def records(run_dir: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


# What docs/metrics.md lists and a run on CPUs without a capacity or a balancing loss does not record.
ELSEWHERE = {
    "memory_allocated", "memory_reserved", "utilization", "power", "temperature", "memory_used", "dropped", "balance_loss",
}  # fmt: skip


def documented_keys() -> dict[str, set[str]]:
    """For each kind of line, the keys in its table of docs/metrics.md."""
    parts = re.split(r"^### `(\w+)`$", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    tables = (text.partition("\n| event |")[0].partition("\n## ")[0] for text in parts[2::2])
    return {
        kind: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        for kind, text in zip(parts[1::2], tables, strict=True)
    }


def test_the_library_example_of_the_readme_runs_as_it_stands_and_trains_without_dynamo(tmp_path):
    code = re.search(r"## As a library\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    run_file = make_world(tmp_path)
    (tmp_path / "configs").mkdir()
    run_file.rename(tmp_path / "configs" / "demo.toml")
    # Training on CPUs imports neither of these, which would take a rank seconds.
    check = "import sys; assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    code = code.replace("trainer.fit()\n", f"trainer.fit()\n{check}\n")
    assert check in code
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"validation loss \d\.\d{4}", done.stdout)
    assert load_file(tmp_path / "my-adapter" / "adapter_model.safetensors")


def test_the_runs_in_a_row_of_the_docs_each_start_from_the_last_adapter(tmp_path):
    page = (ROOT / "docs" / "adapters.md").read_text()
    text = re.search(r"## Several runs in a row\n.*?```bash\n(.*?)```", page, re.DOTALL)[1]
    run_file = make_world(tmp_path)
    (tmp_path / "configs").mkdir()
    run_file.rename(tmp_path / "configs" / "demo.toml")
    # The same conversations twice, so that the losses of the two runs can be compared.
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    kept = None
    for line in text.splitlines():
        program, *words = line.split()
        assert program == "megasft"
        command = Command(words, tmp_path / "errors", folder=tmp_path)
        assert command.wait() == 0, command.said()
        kept = kept or (tmp_path / "runs/first/adapter/adapter_model.safetensors").read_bytes()
    assert (tmp_path / "runs/first/adapter/adapter_model.safetensors").read_bytes() == kept
    first, second = (records(tmp_path / "runs" / name, "train") for name in ("first", "second"))
    assert second[0]["loss"] < 0.99 * first[0]["loss"], "the second run began from nothing"
    fused = load_file(tmp_path / "runs/second/fused/adapter_model.safetensors")
    assert any("mlp.experts" in name for name in fused)


def test_torchrun_trains_on_four_ranks_and_leaves_what_the_readme_lists(tmp_path):
    run_file = make_world(tmp_path, tensor=2, data=2, steps=5)
    run_file.write_text(run_file.read_text() + "[logging]\nexperts_every_steps = 2\n")
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--nproc-per-node", "4", str(ROOT / "tools" / "train.py"), "--config", str(run_file)]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    for path in (
        "config.toml",
        "tensorboard",
        "checkpoints/latest/adapter_config.json",
        "checkpoints/step-000005/optimizer-00003-of-00004.safetensors",
        "best/adapter_config.json",
        "adapter/adapter_config.json",
    ):
        assert (folder / path).exists(), path
    assert not (folder / "checkpoints" / "step-000004").exists(), "keep = 1"
    train = records(folder, "train")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5]
    kinds = {}
    for line in records(folder):
        kinds.setdefault(line["kind"], set()).update(line.keys() - {"kind", "step", "time"})
    page = documented_keys()
    assert kinds.pop("event", set()) <= page["event"]
    assert page.keys() == kinds.keys() | {"event"}
    for kind, found in kinds.items():
        assert found == page[kind] - ELSEWHERE, kind
    # 12 conversations in batches of 4: three steps an epoch.
    assert [line["step"] for line in records(folder, "validation")] == [2, 4, 5]
    assert train[-1]["loss"] < train[0]["loss"]


def test_importing_megasft_is_quick_and_changes_nothing():
    code = "import sys, megasft; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    assert run([sys.executable, "-c", code], ROOT).returncode == 0
