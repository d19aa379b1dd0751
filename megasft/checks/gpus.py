"""What a run file asks of GPUs, against those that are here. Raises before a rank is launched or joins the others."""

import torch
from transformers import Qwen3MoeConfig

from megasft import host
from megasft.config.schema import RunConfig
from megasft.messages import UserError, say_once, warn
from megasft.model.hf_config import DTYPES
from megasft.model.shape import weights
from megasft.plan.devices import CONSTANTS
from megasft.plan.remedies import refuse_too_large

CPU_WEIGHTS = 1e9  # a larger model is trained on CPUs only if the run file says so
ON_CPUS = "--set compute.gpu_count=0 trains on CPUs"


def check_count(config: RunConfig, ranks: int) -> None:
    """Raise UserError unless this machine has the GPUs of `[compute]`, and one for each of its `ranks` ranks."""
    asked, there = config.compute.gpu_count, host.gpus()
    if asked == 0:
        if there:
            raise UserError(
                f"[compute] gpu_count = 0 asks for CPUs, but torch sees {_gpus(there)}; set CUDA_VISIBLE_DEVICES= to "
                "hide them"
            )
        return
    if not there and (asked or config.compute.gpu_type):
        key = f"gpu_count = {asked}" if asked else f'gpu_type = "{config.compute.gpu_type}"'
        raise UserError(f"[compute] {key}, but torch sees no GPU: {host.why_no_gpu()}; {ON_CPUS}")
    if there and (asked or 0) > there:
        raise UserError(
            f"[compute] gpu_count = {asked}, but torch sees {_gpus(there)} on this machine; set it to {there}, with a "
            "[data.topology] that fits"
        )
    check_ranks(ranks)


def check_ranks(ranks: int) -> None:
    """Raise UserError unless each of the `ranks` ranks on this machine has a GPU of its own, if it has GPUs at all."""
    if 0 < (there := host.gpus()) < ranks:
        raise UserError(f"{ranks} ranks on this machine, but torch sees {_gpus(there)}; each rank needs one of its own")


def check_size(config: RunConfig, model: Qwen3MoeConfig) -> None:
    """Raise UserError if a large model would be trained on CPUs although the run file does not say so."""
    size = weights(model)
    if not host.CUDA and config.compute.gpu_count != 0 and size > CPU_WEIGHTS:
        raise UserError(
            f"[job] model = {config.job.model!r} has {size / 1e9:.1f} billion weights, but torch sees no GPU: "
            f"{host.why_no_gpu()}; {ON_CPUS}"
        )


def tell_if_slow(model: Qwen3MoeConfig) -> None:
    """Say so where a large model is to answer on CPUs."""
    if not host.CUDA and (size := weights(model)) > CPU_WEIGHTS:
        warn(f"torch sees no GPU, so {size / 1e9:.1f} billion weights answer on CPUs, slowly: {host.why_no_gpu()}")


def check_kind(config: RunConfig) -> None:
    """Raise UserError if this rank's GPU is not of `[compute] gpu_type`; say where its kernels are slow."""
    if not host.CUDA:
        return
    (name, _), wanted = host.own_gpu(), config.compute.gpu_type
    if wanted and not _names(wanted, name):
        raise UserError(
            f'[compute] gpu_type = "{wanted}", but this GPU is a {name}; --set compute.gpu_type={name!r} takes it'
        )
    if slow := host.groups_products(DTYPES[config.dtype]):
        say_once(
            f"torch {torch.__version__} has no grouped GEMM {slow}: experts are multiplied one after the other, and "
            "the host waits for the device at each product; for bf16 on an H100, H200 or B200 it has one"
        )


def check_memory(config: RunConfig, model: Qwen3MoeConfig, ranks: int) -> None:
    """Raise UserError if the job's plan does not fit the free memory of this rank's GPU."""
    if not host.CUDA:
        return
    free, total = host.free_memory()
    usable = min(free, int(total * (1 - CONSTANTS.reserve)))
    refuse_too_large(config, model, ranks, host.own_gpu()[0], usable, min(ranks, host.gpus()))


def _names(wanted: str, name: str) -> bool:
    """Whether "H200", "8xH100", "A100-80GB" or "nvidia-l40s" may mean the GPU `name`, such as "NVIDIA H200 NVL".

    Only the words with a digit are compared: makers and cloud providers write the others in their own ways.
    """
    words = [word.lower() for word in wanted.replace("-", " ").replace("_", " ").split()]
    models = [word.partition("x")[2] if word.partition("x")[0].isdigit() else word for word in words]
    known = "".join(name.lower().split())
    return all(model in known for model in models if any(map(str.isdigit, model)))


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"
