"""The one place that calls bitsandbytes: to dequantize NF4 to bf16 or fp32, and to quantize scales to 8 bits.

On CPUs we call the compiled library without its Python package. The package's operator allocates a new tensor for
every result, and page faults then limit it to 2.1 GB/s of bf16 on one core of an AMD EPYC (Zen 5); into a reused buffer
the library writes 16 GB/s, the speed of a plain copy. Look-ups with torch operators reach 4 GB/s at best, because they
pass over fp32 three times (`benchmarks/quant.py speed` prints all of these). Importing the package would also cost each
rank 6 s. On CUDA we call the package's operators, which write to a given output.
"""

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

import torch
from torch import Tensor

from megasft.messages import UserError

GROUP = 256  # number of scales that share one second-level scale (double quantization)

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def dequantize_nf4(packed: Tensor, scales: Tensor, out: Tensor, block_size: int) -> None:
    """out = code[packed] * scales, in fp32 and rounded once to out's dtype (bf16 or fp32).

    packed: uint8, two weights per byte, the first in the upper half. scales: fp32, one per `block_size` weights in
    memory order. All tensors must be contiguous.
    """
    if out.device.type == "cuda":
        operators().dequantize_4bit.out(packed, scales, block_size, "nf4", out.shape, out.dtype, out=out)
        return
    function = getattr(_library(), f"cdequantize_blockwise_cpu_nf4_{_SUFFIXES[out.dtype]}")
    rows, columns = out.numel() // out.shape[-1], out.shape[-1]
    function(
        _pointer(packed), _pointer(scales), _pointer(out), *map(ctypes.c_longlong, (block_size, rows, columns))
    )  # fmt: skip


def quantize_scales(scales: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize fp32 scales [n] on the CPU in groups of GROUP.

    Returns the indices of the nearest entries of `code` [256], uint8 [n], and each group's largest magnitude, fp32.
    """
    indices = torch.empty(scales.shape, dtype=torch.uint8)
    largest = torch.empty(-(-scales.numel() // GROUP))
    _library().cquantize_blockwise_cpu_fp32(
        _pointer(code), _pointer(scales), _pointer(largest), _pointer(indices),
        ctypes.c_longlong(GROUP), ctypes.c_longlong(scales.numel()),
    )  # fmt: skip
    return indices, largest


def require() -> None:
    """Raise UserError if bitsandbytes is missing or has no CPU library."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("bitsandbytes")
    if package is None or package.origin is None:
        raise UserError("[training] use_qlora = true needs bitsandbytes: pip install 'megasft[qlora]'")
    found = sorted(Path(package.origin).parent.glob("libbitsandbytes_cpu.*"))
    if not found:
        raise UserError(f"{Path(package.origin).parent}: bitsandbytes has no CPU library; install bitsandbytes 0.50.2")
    return ctypes.CDLL(str(found[0]))


@functools.cache
def operators() -> "torch._ops._OpNamespace":
    """bitsandbytes' operators for CUDA."""
    # Silences a warning that no fused CPU kernel exists; we do not use one.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401 (registers them)

    return torch.ops.bitsandbytes


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())
