"""What a run is about, beside its settings: data, topology, adapter and environment; `about.json` in its folder."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasft import host
from megasft.data.dataset import Mix, Samples
from megasft.distributed.topology import Topology
from megasft.messages import say
from megasft.train.trainer import Trainer

FILE = "about.json"
OF_THE_END = ("answers.json", "report.html")
PACKAGES = ("megasft", "torch", "megatron-core", "transformers", "peft", "tokenizers", "safetensors", "triton")
OPTIONAL = ("transformer-engine", "bitsandbytes", "flash-attn")


def write_about(trainer: Trainer, topology: Topology) -> None:
    """Write `about.json`; rank 0 does. A folder that cannot be written does not end the run.

    Answers and report of an earlier run in the folder, or of an earlier end of this one, are removed.
    """
    if not topology.is_first:
        return
    path = Path(trainer.config.job.output_dir) / FILE
    try:
        if trainer.step < trainer.total_steps:
            for name in OF_THE_END:
                path.with_name(name).unlink(missing_ok=True)
        path.write_text(json.dumps(describe(trainer, topology), indent=1) + "\n")
    except OSError as error:
        say(f"{path}: cannot be written ({error.strerror}); training continues")


def describe(trainer: Trainer, topology: Topology) -> dict[str, Any]:
    """What `about.json` holds."""
    sizes = topology.sizes
    return {
        "total_steps": trainer.total_steps,
        "data": {"training": _counts(trainer.train)}
        | ({"validation": _counts(trainer.validation)} if trainer.validation is not None else {}),
        "topology": {
            "ranks": sizes.tensor * sizes.pipeline * sizes.data,
            "tensor_parallel": sizes.tensor,
            "expert_parallel": sizes.expert,
            "expert_tensor_parallel": sizes.expert_tensor,
            "pipeline_parallel": sizes.pipeline,
            "data_parallel": sizes.data,
        },
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """Versions and machine, of rank 0."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if host.gpus():
        return found | {"device": host.own_gpu()[0], "CUDA": str(torch.version.cuda)}
    return found | {"device": f"CPU, {os.cpu_count()} cores"}


def _counts(samples: Samples | Mix) -> dict[str, int]:
    lengths = Mix.of(samples).lengths
    return {
        "conversations": len(lengths),
        "tokens": int(lengths.sum()),
        "median_tokens": int(np.median(lengths)) if len(lengths) else 0,
        "longest_tokens": int(lengths.max(initial=0)),
    }
