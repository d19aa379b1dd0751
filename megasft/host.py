"""What the device of this host answers; nothing else in megasft tests for CUDA."""

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megasft.messages import say_once

CUDA = torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", _own()) if CUDA else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backends: gloo for CPU tensors and Python objects, NCCL for CUDA tensors."""
    return "cpu:gloo,cuda:nccl" if CUDA else "gloo"


def device_memory() -> int:
    """Peak memory in bytes: of this rank's GPU since the start, or the resident set of this process on the CPU."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Around copies from the device to pinned memory, in any thread: they are complete afterwards, and do not wait for
    other work on the device. What they copy must be complete before.
    """
    if not CUDA:
        yield
        return
    with torch.cuda.device(_own()), torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.current_stream().synchronize()


def _own() -> int:
    """This rank's GPU; a thread's current device is 0 until it sets one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def synchronize() -> None:
    """Wait for the device, so that a time taken next includes its work."""
    if CUDA:
        torch.cuda.synchronize()


def collectives() -> list[list[dict[str, Any]]]:
    """The last collectives that this process entered, from PyTorch's flight recorders of gloo and NCCL.

    An entry has the kind (`profiling_name`), the group (`process_group`: name, description), the number within the
    group (`collective_seq_id`) and whether it has ended (`retired`). torch 2.13 records TORCH_FR_BUFFER_SIZE of them by
    default; reading 2,000 takes 20 ms, from any thread.
    """
    import torch._C._distributed_c10d

    c10d: Any = torch._C._distributed_c10d  # whose stubs leave these two out
    dumps = [c10d._dump_fr_trace_json(True, False)]
    if CUDA:
        dumps.append(c10d._dump_nccl_trace_json(True, False))
    return [json.loads(dump).get("entries", []) for dump in dumps]


def grouped_rows(dtype: torch.dtype) -> int:
    """Multiple to which each expert's rows are padded in a grouped GEMM.

    oneDNN compiles a bf16 kernel for each new row count (about 1 ms) and routing produces new counts all the time;
    rounded up to multiples of 32 they soon repeat. fp32 on the CPU, and CUDA, take any count.
    """
    return 32 if not CUDA and dtype == torch.bfloat16 else 1


def experts_at_once() -> int:
    """How many experts of a layer with a 4-bit base are dequantized together: on a GPU all, for one grouped GEMM; on a
    CPU one, which stays in its cache until it is multiplied.
    """
    return 2**31 if CUDA else 1


def be_deterministic() -> None:
    """Make runs bitwise reproducible where there is a choice; call it before CUDA or NCCL is used.

    torch raises where an operation has no deterministic kernel. NCCL's algorithms that sum in the switch (NVLS) are
    excluded, as by Megatron-LM's `--deterministic-mode`; variables set in the environment are kept.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
    vars(torch.utils.deterministic)["fill_uninitialized_memory"] = False
    torch.backends.cudnn.benchmark = False


@functools.cache
def dot_product_attention() -> type | None:
    """Transformer Engine's attention with variable lengths, where there is a GPU for it; None means PyTorch's SDPA.

    Says once where a GPU goes without it.
    """
    if not CUDA:
        return None
    # megatron-core 0.19.2 imports without Transformer Engine too, with mocks in place of its classes.
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        say_once(
            "Transformer Engine is not installed: attention calls PyTorch's SDPA once for each conversation of a micro "
            "batch, which is slower; install it with: pip install -e '.[te]' (compiles, and needs nvcc)"
        )
        return None
    return transformer_engine.TEDotProductAttention


def import_megatron() -> None:
    """Import megatron-core; where there is no CUDA, without dynamo and inductor, which nothing here uses on CPUs.

    They cost 40% of a rank's start, and are imported by megatron-core's `torch.compile` decorators, and by the first
    call of an optimizer's methods to mark these as not to be compiled. For doors that know that megatron-core comes
    next; whoever imports it first all the same only waits longer.
    """
    if "megatron.core" in sys.modules:
        return
    compile_ = torch.compile
    if not CUDA:
        torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            method = getattr(torch.optim.Optimizer, name).__wrapped__
            method.__dynamo_disable = method  # where torch.compiler.disable(method) is kept by its first call
    try:
        import megatron.core.distributed
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.transformer.moe.moe_layer  # noqa: F401
    finally:
        torch.compile = compile_


@functools.cache
def prepare() -> None:
    """Make megatron-core usable on this host. Call it before any process group is made; a second call does nothing."""
    # Warnings meant for users of megatron-core's own scripts: that HybridModel will replace GPTModel (the class that
    # everyone trains with today), and how DDP lays out its buffers.
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
    if CUDA:
        torch.cuda.set_device(_own())
        return
    from megasft.cpu_megatron import run_megatron_on_cpus

    run_megatron_on_cpus()
