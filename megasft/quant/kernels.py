"""The one place that calls bitsandbytes: NF4 to bf16 or fp32, and scales to 8 bits.

On CPUs the compiled library is called without the Python package around it. The package's operator makes a new tensor
for every result, whose pages the kernel then has to fault in: 2.1 GB/s of bf16 on one core of an AMD EPYC (Zen 5), and
16 GB/s, the speed of a plain copy, into a buffer that is used again. Look-ups through torch operators reach 4 GB/s at
best, because they pass over fp32 three times (`benchmarks/quant.py speed` prints all of these). And importing the
package costs every rank 6 s. On CUDA the package's own operators are called; they take a result to write to.
"""

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

import torch
from torch import Tensor

from megasft.messages import UserError

GROUP = 256  # scales that share a scale of their own, when they are quantized too

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def dequantize_nf4(packed: Tensor, scales: Tensor, out: Tensor, block_size: int) -> None:
    """out = code[packed] * scales, in fp32 and rounded once to out's dtype (bf16 or fp32).

    packed uint8, two weights a byte, the first in the upper half; scales fp32, one for every `block_size` weights in
    the order of memory; all contiguous.
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
    """fp32 [n] on the CPU in groups of GROUP: indices uint8 [n] of the nearest entries of `code` [256], and the
    largest magnitude of each group, fp32.
    """
    indices = torch.empty(scales.shape, dtype=torch.uint8)
    largest = torch.empty(-(-scales.numel() // GROUP))
    _library().cquantize_blockwise_cpu_fp32(
        _pointer(code), _pointer(scales), _pointer(largest), _pointer(indices),
        ctypes.c_longlong(GROUP), ctypes.c_longlong(scales.numel()),
    )  # fmt: skip
    return indices, largest


def require() -> None:
    """Raise UserError if there is no bitsandbytes to work with."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("bitsandbytes")
    if package is None or package.origin is None:
        raise UserError("[training] use_qlora = true needs bitsandbytes: pip install 'megasft[qlora]'")
    found = sorted(Path(package.origin).parent.glob("libbitsandbytes_cpu.*"))
    if not found:
        raise UserError(f"{Path(package.origin).parent}: this bitsandbytes has no library for CPUs; install 0.50.2")
    return ctypes.CDLL(str(found[0]))


@functools.cache
def operators() -> "torch._ops._OpNamespace":
    """bitsandbytes' operators for CUDA."""
    # that there is no fused kernel for CPUs, which nobody asked for
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401 (registers them)

    return torch.ops.bitsandbytes


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())
