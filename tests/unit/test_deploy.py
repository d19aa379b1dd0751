"""The container files and the SkyPilot file name what this repository has, in the versions it pins."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megasft.config.schema import load_config

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["deploy/Dockerfile", "deploy/Dockerfile.ngc"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_the_pinned_versions(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    installs = [line for line in re.split(r"&&|\n", text) if "pip install" in line]
    assert len(installs) >= 2
    assert all("--constraint constraints.txt" in line for line in installs)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert re.findall(r"uv==(\S+)", text) == [pinned["uv"]]
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"--editable '\.\[([\w,]+)\]'", text):
        assert all(re.search(rf"^{word} = \[", project, re.MULTILINE) for word in extra.split(","))
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in copied.split())


def test_skypilot_asks_for_the_reference_jobs_gpus_and_runs_what_is_there():
    task = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())
    compute = load_config(ROOT / "configs/qwen3_coder_30b.toml").compute
    assert task["resources"]["accelerators"] == f"{compute.gpu_type}:{compute.gpu_count}"
    lines = [shlex.split(line) for line in task["run"].splitlines()]
    scripts = [words[0] for words in lines if words[0].startswith("tools/")]
    assert scripts == ["tools/gpu_acceptance.sh", "tools/run_sft_qwen30b.sh"]
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)
    assert lines[0] == ["set", "-e"], "the job must not start if a check fails"
