"""The operators of `lora.dropout` in Triton, for CUDA. Their numbers are those of the CPU's operators, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasft.lora.dropout import MIX_32, MIX_64, SHARES

_S1, _M1, _S2, _M2, _S3 = map(tl.constexpr, MIX_32)
_LONG_S1, _LONG_M1, _LONG_S2, _LONG_M2, _LONG_S3 = map(tl.constexpr, MIX_64)
_SHARES = tl.constexpr(SHARES)
ROWS, PAIRS, COUNTERS = 16, 128, 1024  # of a block


def hash_rows(counters: Tensor, key: int) -> Tensor:
    """See `lora.dropout`: int64 [T] -> int32 [T]."""
    counters = counters.contiguous()
    hashes = counters.new_empty(counters.shape, dtype=torch.int32)
    n = counters.numel()
    if n:
        _hash_rows[(triton.cdiv(n, COUNTERS),)](counters, hashes, key, n, COUNTERS)
    return hashes


def drop(x: Tensor, rows: Tensor, first: int, share: int) -> Tensor:
    """See `lora.dropout`: x [T, K], rows int32 [T] -> [T, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (height, width) = x.shape
    if x.numel():
        pairs = (first + width + 1) // 2 - first // 2
        grid = (triton.cdiv(height, ROWS), triton.cdiv(pairs, PAIRS))
        _drop[grid](x, rows, out, first, share, height, width, x.stride(0), ROWS, PAIRS)
    return out


@triton.jit
def _mixed(bits):
    bits ^= bits >> _S1
    bits *= _M1
    bits ^= bits >> _S2
    bits *= _M2
    return bits ^ (bits >> _S3)


@triton.jit(do_not_specialize=["key", "n"])
def _hash_rows(counters, hashes, key: tl.int64, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = (tl.load(counters + at, mask=at < n, other=0) ^ key).to(tl.uint64, bitcast=True)
    bits ^= bits >> _LONG_S1
    bits *= _LONG_M1
    bits ^= bits >> _LONG_S2
    bits *= _LONG_M2
    bits ^= bits >> _LONG_S3
    tl.store(hashes + at, bits.to(tl.uint32).to(tl.int32, bitcast=True), mask=at < n)


@triton.jit(do_not_specialize=["first", "share", "height"])
def _drop(x, rows, out, first, share, height, width, stride, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """One block of rows and of pairs of features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_bits = tl.load(rows + row, mask=row < height, other=0).to(tl.uint32, bitcast=True)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    bits = _mixed(row_bits[:, None] ^ _mixed((first // 2 + pair).to(tl.uint32))[None, :])
    halves = tl.reshape(tl.join(bits & (_SHARES - 1), bits >> 16), ROWS, 2 * PAIRS)
    column = 2 * PAIRS * tl.program_id(1) + tl.arange(0, 2 * PAIRS) - first % 2
    inside = (row < height)[:, None] & ((column >= 0) & (column < width))[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * stride + column[None, :], mask=inside, other=0.0)
    value = tl.where(halves < share.to(tl.uint32), 0.0, value).to(value.dtype)
    tl.store(out + at * width + column[None, :], value, mask=inside)
