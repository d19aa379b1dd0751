"""What the device of this host answers; nothing else in megasft tests for CUDA."""

import contextlib
import functools
import glob
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from megasft.messages import say_once

CUDA = torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank's model."""
    return torch.device("cuda", _own()) if CUDA else torch.device("cpu")


def gpus() -> int:
    """The number of GPUs that torch sees on this machine."""
    return torch.cuda.device_count() if CUDA else 0


def own_gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of this rank's GPU, such as ("NVIDIA H200", (9, 0))."""
    return torch.cuda.get_device_name(_own()), torch.cuda.get_device_capability(_own())


def free_memory() -> tuple[int, int]:
    """Free and total bytes of this rank's GPU."""
    return torch.cuda.mem_get_info(_own())


def why_no_gpu() -> str:
    """Why torch sees no GPU here, from what torch says, the device files and CUDA_VISIBLE_DEVICES."""
    files = sorted(glob.glob("/dev/nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
    else:
        said = "it sees one now"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install PyPI's"
    if old := re.search(r"driver on your system is too old \(found version (\d+)\)", said):
        major, minor = divmod(int(old[1]) // 10, 100)
        return (
            f"the NVIDIA driver is too old: it is for CUDA {major}.{minor}, torch for {torch.version.cuda}; update it"
        )
    if visible == "":
        return "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs; unset it"
    if not files:
        return (
            "there is no /dev/nvidia0: this machine has no GPU or no driver, or its container was started without GPUs"
        )
    if visible is not None and "No CUDA GPUs" in said:
        return f"CUDA_VISIBLE_DEVICES={visible} names none of {', '.join(files)}; unset it"
    return f"torch says: {said}"


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


Mark = Any  # a point in this rank's work: a CUDA event, elsewhere a time


def mark() -> Mark:
    """A point in the work given to the device so far; does not wait for it."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to another; the device must have come to both."""
    return start.elapsed_time(end) / 1000 if CUDA else end - start


def memory_in_use() -> tuple[float, float]:
    """(bytes allocated, bytes reserved) by torch on this rank's GPU; NaN on CPUs, whose allocator does not count."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if CUDA else (math.nan, math.nan)


def ranks_share_cores() -> bool:
    """Whether ranks compute on CPUs and this machine has fewer cores than ranks."""
    return not CUDA and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > len(os.sched_getaffinity(0))


def own_uuid() -> str | None:
    """NVML's name of this rank's GPU, or None without one."""
    return f"GPU-{torch.cuda.get_device_properties(_own()).uuid}" if CUDA else None


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
    """Transformer Engine's attention over variable lengths, on a GPU where it is installed; None means torch's own.

    Not in deterministic runs, and says so: its backward over variable lengths (thd) on sm_90 then either takes
    workspaces that grow with the square of a segment's length, some 34 GB for 4,096 tokens and 16 heads (Transformer
    Engine 2.20, cuDNN 9.20), or a kernel that is not fused.
    """
    if not CUDA:
        return None
    # megatron-core 0.19.2 imports without Transformer Engine too, with mocks in place of its classes.
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        return None
    if torch.are_deterministic_algorithms_enabled():
        say_once(
            "[job] deterministic = true: attention is torch's, for Transformer Engine's deterministic backward takes "
            "memory that grows with the square of a conversation's length"
        )
        return None
    return transformer_engine.TEDotProductAttention


@functools.cache
def packs_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash attention over variable lengths (torch.nn.attention.varlen) takes these heads here.

    Its kernels are for 16-bit numbers, compute capability 8.0 and later, and head dimensions that are multiples of 8 up
    to 256 (torch 2.13, FlashAttention 2), in forward and backward; backward is deterministic where torch is told to be.
    Says once where a GPU goes without them.
    """
    if not CUDA:
        return False
    name, capability = own_gpu()
    for fits, why in (
        (dtype in (torch.bfloat16, torch.float16), f"they compute in 16 bits, not in {str(dtype).partition('.')[2]}"),
        (capability >= (8, 0), f"{name} is older than compute capability 8.0"),
        (head_dim % 8 == 0 and head_dim <= 256, f"a head dimension of {head_dim} is no multiple of 8 up to 256"),
    ):
        if not fits:
            say_once(
                f"attention calls PyTorch's SDPA once for each conversation of a micro batch, which is slower than the "
                f"kernels for all of them at once: {why}"
            )
            return False
    return True


def groups_products(dtype: torch.dtype) -> str | None:
    """Why the experts' grouped products loop on this rank's GPU, or None where they are one kernel.

    torch 2.13 has that kernel for bf16 on compute capability 9 (H100, H200) and 10 (B200, B300) only. Otherwise
    `grouped_mm` copies the offsets to the host, which waits for the device, and multiplies one expert after the other.
    """
    if not CUDA:
        return None
    name, (major, minor) = own_gpu()
    if dtype != torch.bfloat16:
        return f"for {str(dtype).partition('.')[2]}"
    return f"for {name} (compute capability {major}.{minor})" if major not in (9, 10) else None


def import_megatron() -> None:
    """Import megatron-core; where there is no CUDA, without dynamo and inductor, which nothing here uses on CPUs.

    They cost 40% of a rank's start. megatron-core's `torch.compile` decorators import them, and so do the first call of
    an optimizer's methods, to mark these as not to be compiled, and its `step`, to break a graph there. For doors that
    know that megatron-core comes next; whoever imports it first all the same only waits longer.
    """
    if "megatron.core" in sys.modules:
        return
    compile_ = torch.compile
    if not CUDA:
        torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            method = getattr(torch.optim.Optimizer, name).__wrapped__
            method.__dynamo_disable = method  # where torch.compiler.disable(method) is kept by its first call
        torch.optim.Adam.step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[method-assign,attr-defined]
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
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            # Each micro batch has new sizes. Segments that grow do not fragment; read at torch's first allocation.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(_own())
        return
    from megasft.cpu_megatron import run_megatron_on_cpus

    run_megatron_on_cpus()
