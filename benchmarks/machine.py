"""The benchmark's machine: its description, the products that measure it, and the memory that a step takes."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megasft import host

PROBES = ((1024, 512, 2048), (2048, 2048, 2048))  # rows, inputs, outputs
PROBE_SECONDS = 0.05


def describe(dtype: str, ranks: int) -> dict[str, Any]:
    """The hardware, versions and settings that the figures depend on."""
    return {
        "processor": torch.cuda.get_device_name() if host.CUDA else _cpu_model(),
        "cores": os.cpu_count(),
        "ranks": ranks,
        "threads_per_rank": torch.get_num_threads(),
        "dtype": dtype,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "megatron-core", "transformers", "peft")},
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bf16_advice(dtype: str) -> str | None:
    """What to do where bf16 is asked for and the processor has no instructions for it."""
    if host.CUDA or dtype != "bf16" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return (
        "this processor has no bf16 instructions (AVX512-BF16, AMX) and emulates them at a fraction of fp32's rate: "
        "compare with --dtype fp32, and train in fp32 on it ([hyperparameters.parallelism] bf16 = false)"
    )


@dataclass
class Peak:
    """Peak bytes in use beyond those in use before; None if the system does not report them."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_of_body() -> Iterator[Peak]:
    """Measure the peak memory of the body, including what it frees again: activations and other temporaries."""
    peak = Peak()
    if host.CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    try:
        # Trim first, so that memory that malloc keeps in reserve counts when it is used. "5" resets the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    peak.bytes = _status("VmHWM") - before


def _status(key: str) -> int:
    """The value of `key` in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
