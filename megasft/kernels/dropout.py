"""The hashes of `lora.dropout` in Triton, for CUDA: bit for bit those of the CPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasft.lora.dropout import MIX_32, MIX_64

_S1, _M1, _S2, _M2, _S3 = map(tl.constexpr, MIX_32)
_LONG_S1, _LONG_M1, _LONG_S2, _LONG_M2, _LONG_S3 = map(tl.constexpr, MIX_64)
COUNTERS = 1024  # of a block


def hash_rows(counters: Tensor, key: int) -> Tensor:
    """See `lora.dropout`: int64 [T] -> int32 [T]."""
    counters = counters.contiguous()
    hashes = counters.new_empty(counters.shape, dtype=torch.int32)
    n = counters.numel()
    if n:
        _hash_rows[(triton.cdiv(n, COUNTERS),)](counters, hashes, key, n, COUNTERS)
    return hashes


@triton.jit
def mixed(bits):
    """See `lora.dropout`: uint32, mixed."""
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
