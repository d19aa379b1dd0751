"""What is installed, against what was tried together, in the order in which it would break."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from tests.gpu.place import Place

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "peft",
    "bitsandbytes",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
)
ENGINE = "2.20.2"  # of Transformer Engine, as in pyproject.toml


def environment(place: Place) -> None:
    """Driver, packages, cuDNN and NCCL."""
    import torch

    if place.device == "cuda":
        driver = _nvidia_smi("driver_version")[0]
        needed = 580 if str(torch.version.cuda).startswith("13") else 525  # the first of CUDA 13 and 12
        place.note(
            "driver", driver, f"{needed} or later, for CUDA {torch.version.cuda}", int(driver.split(".")[0]) >= needed
        )
        for i in range(place.ranks):
            capability = torch.cuda.get_device_capability(i)
            place.note(
                f"GPU {i}", torch.cuda.get_device_name(i), "compute capability 9 or 10", capability[0] in (9, 10)
            )
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in PACKAGES:
        place.equal(name, _version(name), pinned[name])
    if (engine := _version("transformer-engine")) != "not installed":
        place.equal("transformer-engine", engine, ENGINE)
        from megatron.core.extensions import transformer_engine

        place.equal("megatron-core finds Transformer Engine", transformer_engine.HAVE_TE, True)
    if place.device == "cuda":
        cudnn = torch.backends.cudnn.version() or 0
        place.note("cuDNN that torch loads", cudnn, "9.20 to 9.23", 92000 <= cudnn < 92400)
        place.note("NCCL that torch loads", torch.cuda.nccl.version(), f"that of {pinned['nvidia-nccl-cu13']}",
                   ".".join(map(str, torch.cuda.nccl.version())) == pinned["nvidia-nccl-cu13"])  # fmt: skip
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        place.note(
            "a C compiler and Python.h, for Triton",
            f"{compiler}, {header.exists()}",
            "both",
            bool(compiler and header.exists()),
        )
        x = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda")
        place.equal("a product on the GPU", float((x @ x).sum()), 256.0**3)


def machine(place: Place) -> dict[str, Any]:
    """For the head of the report."""
    found = {
        "host": platform.node(),
        "cores": os.cpu_count(),
        "torch": _version("torch"),
        "device": place.device,
        "ranks": place.ranks,
    }
    if place.device == "cuda":
        found |= {"GPUs": ", ".join(_nvidia_smi("name")), "driver": _nvidia_smi("driver_version")[0]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found | {"commit": commit.stdout.strip() or "unknown"}


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
