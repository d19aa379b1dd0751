"""The hashes of `lora.dropout` in Triton, for CUDA: bit for bit those of the CPU."""

import triton
import triton.language as tl

from megasft.lora.dropout import MIX_32, MIX_64

_S1, _M1, _S2, _M2, _S3 = map(tl.constexpr, MIX_32)
_LONG_S1, _LONG_M1, _LONG_S2, _LONG_M2, _LONG_S3 = map(tl.constexpr, MIX_64)


@triton.jit
def mixed(bits):
    """See `lora.dropout`: uint32, mixed."""
    bits ^= bits >> _S1
    bits *= _M1
    bits ^= bits >> _S2
    bits *= _M2
    return bits ^ (bits >> _S3)


@triton.jit
def row_hashes(counters, key):
    """See `lora.dropout`: int64 counters of rows and the key of step and layer, to uint32."""
    bits = (counters ^ key).to(tl.uint64, bitcast=True)
    bits ^= bits >> _LONG_S1
    bits *= _LONG_M1
    bits ^= bits >> _LONG_S2
    bits *= _LONG_M2
    return (bits ^ (bits >> _LONG_S3)).to(tl.uint32)
