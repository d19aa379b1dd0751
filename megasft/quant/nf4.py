"""bitsandbytes' NF4 format: quantize a matrix to 4-bit codes with one scale per block, and the scales to 8 bits.

A block is `block_size` weights of one row. Its scale is its largest magnitude. A weight divided by the scale becomes
the nearest of sixteen fixed numbers, the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314).
Double quantization subtracts the matrix's mean scale from each scale and quantizes the rest to 8 bits in groups of 256
(Dettmers et al. 2021, arXiv:2110.02861). We quantize the full matrix of the checkpoint and slice it afterwards, so that
values do not depend on the topology. Codes, scales and means are bitwise those of
`bitsandbytes.functional.quantize_4bit` on the same matrix with one thread.

    packed  uint8 [N, K / 2]            two codes per byte, the first in the upper half
    scales  uint8 [N, K / block_size]   indices into DYNAMIC. Without double quantization: fp32, no groups and no mean
    groups  fp32  [ceil(scales / 256)]  the largest magnitude of each group of scales, in row-major order
    mean    fp32  []                    the mean of all scales
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megasft.config.schema import QuantSettings
from megasft.messages import UserError
from megasft.quant import kernels
from megasft.quant.kernels import GROUP
from megasft.storage.safetensors import TensorSpec

Quantized = dict[str, Tensor]

# fp32, from bitsandbytes' get_4bit_type("nf4")
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BOUNDS = (NF4[1:] + NF4[:-1]) / 2  # a weight exactly on a bound becomes the smaller of the two neighbours
LARGEST = 65504.0  # largest fp16 number


def specs(shape: tuple[int, ...], settings: QuantSettings) -> dict[str, TensorSpec]:
    """Dtypes and shapes of a quantized matrix [N, K] or of a stack of matrices [E, N, K]."""
    *stack, n, k = shape
    blocks = k // settings.block_size
    found = {"packed": TensorSpec(torch.uint8, (*stack, n, k // 2))}
    if not settings.double:
        return found | {"scales": TensorSpec(torch.float32, (*stack, n, blocks))}
    return found | {
        "scales": TensorSpec(torch.uint8, (*stack, n, blocks)),
        "groups": TensorSpec(torch.float32, (*stack, -(-n * blocks // GROUP))),
        "mean": TensorSpec(torch.float32, tuple(stack)),
    }


def bytes_per_weight(settings: QuantSettings) -> float:
    """Bytes per weight, not counting the mean (4 bytes per matrix) and a last group that is not full."""
    if not settings.double:
        return 0.5 + 4 / settings.block_size
    return 0.5 + (1 + 4 / GROUP) / settings.block_size


def quantize(weight: Tensor, settings: QuantSettings, name: str) -> Quantized:
    """Quantize a matrix [N, K] of bf16, fp16 or fp32 on the CPU.

    Raises UserError naming the tensor if `block_size` does not divide K, or if a value is not finite or exceeds fp16:
    in 4 bits, such a weight would round all weights that share its scale to zero.
    """
    n, k = weight.shape
    if k % settings.block_size:
        raise UserError(
            f"tensor {name!r} has {k} inputs, which [quant] block_size = {settings.block_size} does not divide"
        )
    blocks = weight.contiguous().view(-1, settings.block_size)
    codes, scales = _quantize_bf16(blocks) if weight.dtype == torch.bfloat16 else _quantize_by_rule(blocks)
    largest = float(scales.max())
    if not largest <= LARGEST:
        what = f"a weight of {largest:g}, beyond fp16's {LARGEST:g}" if math.isfinite(largest) else "values not finite"
        raise UserError(f"tensor {name!r} holds {what}, and cannot be quantized; repair the checkpoint, or set "
                        "[training] use_qlora = false")  # fmt: skip
    found = {"packed": _pack(codes).view(n, k // 2), "scales": scales.view(n, -1)}
    if settings.double:
        with one_thread():  # the order in which torch adds more than 2^15 numbers depends on the number of threads
            mean = scales.mean()
        found["scales"], found["groups"] = kernels.quantize_scales(found["scales"] - mean, DYNAMIC)
        found["mean"] = mean
    return found


def dequantize(quantized: Quantized, settings: QuantSettings, dtype: torch.dtype) -> Tensor:
    """The dequantized matrix [N, K], in bf16 or fp32."""
    scales = quantized["scales"]
    if settings.double:
        groups = quantized["groups"].repeat_interleave(GROUP)[: scales.numel()].view(scales.shape)
        scales = DYNAMIC[scales.long()].mul_(groups).add_(quantized["mean"])
    n, half = quantized["packed"].shape
    out = torch.empty(n, 2 * half, dtype=dtype)
    kernels.dequantize_nf4(quantized["packed"].contiguous(), scales.contiguous(), out, settings.block_size)
    return out


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- weights to codes -------------------------------------------------------------------------------------------------


def _quantize_by_rule(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize blocks [n, block_size] of any dtype to codes, uint8 [n, block_size], and scales, fp32 [n]."""
    blocks = blocks.float()
    scales = blocks.abs().amax(1)
    return _nearest(blocks * (1 / scales.clamp_min(1e-38))[:, None]), scales


def _nearest(scaled: Tensor) -> Tensor:
    """The code of each scaled weight: the number of BOUNDS below it. Counting is faster than `torch.bucketize`."""
    codes = torch.zeros(scaled.shape, dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    for bound in BOUNDS.tolist():
        codes += torch.gt(scaled, bound, out=above).view(torch.uint8)
    return codes


# Read as an integer, the bits of a bf16 without its sign count in steps of 1/128 of an octave. So a weight's distance
# from its block's largest magnitude, together with the fraction of that magnitude and the sign, determines their
# quotient, for any exponent. Beyond six octaves the quotient is less than half of the codes next to zero.
_FRACTIONS, _DISTANCES, _SIGN = 128, 1024, 1024
_SMALLEST, _LARGEST = (7 * _FRACTIONS, 0x7E80)  # between these magnitudes (bits), no value involved is subnormal
_CHUNK = 2**18  # weights per chunk, so that all intermediates fit the L2 cache


def _quantize_bf16(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """As `_quantize_by_rule`, for bf16, with a lookup table of its results: 2 GB/s per core instead of 0.3."""
    bits, table = blocks.view(torch.int16), _table()
    size = blocks.shape[1]
    codes = torch.empty(bits.shape, dtype=torch.uint8)
    scales = torch.empty(len(bits))
    step = max(1, _CHUNK // size)
    for start in range(0, len(bits), step):
        chunk = bits[start : start + step]
        index = chunk & 0x7FFF
        largest = index.amax(1, keepdim=True)
        torch.sub(largest, index, out=index).clamp_max_(_DISTANCES - 1)
        index |= (chunk >> 5) & _SIGN
        wide = index.int().add_((largest & (_FRACTIONS - 1)).int() * (2 * _DISTANCES))
        torch.index_select(table, 0, wide.view(-1), out=codes[start : start + step].view(-1))
        scales[start : start + step] = largest[:, 0].view(torch.bfloat16)
        strange = ((largest < _SMALLEST) | (largest > _LARGEST))[:, 0].nonzero()[:, 0] + start
        if len(strange):
            codes[strange] = _quantize_by_rule(blocks[strange])[0]
    return codes, scales


@functools.cache
def _table() -> Tensor:
    """uint8 [fraction of the largest magnitude, sign, distance]: the codes of `_quantize_by_rule`, 256 KiB."""
    largest = (0x3F80 + torch.arange(_FRACTIONS)).view(-1, 1, 1)
    magnitude = (largest - torch.arange(_DISTANCES)).expand(-1, 2, -1)
    bits = magnitude | torch.tensor([0, -0x8000]).view(1, 2, 1)
    weights, scales = (part.to(torch.int16).view(torch.bfloat16).float() for part in (bits, largest))
    return _nearest(weights * (1 / scales)).view(-1)


def _pack(codes: Tensor) -> Tensor:
    # Each little-endian 16-bit word holds two codes, the first in its lower half. Shifting words is fast; torch is slow
    # on strided bytes.
    pairs = codes.view(torch.int16)
    return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8)


# --- scales to codes --------------------------------------------------------------------------------------------------


def _dynamic_map() -> Tensor:
    """The 256 numbers of the dynamic 8-bit type: a sign, a decimal exponent of 0 to 6, and the rest as fraction."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        numbers = 10 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2)
        found += [*numbers.tolist(), *(-numbers).tolist()]
    return torch.tensor(sorted(found))


DYNAMIC = _dynamic_map()
