"""Scales of a 4-bit base, dequantized in Triton, for CUDA: one launch for a layer's matrices."""

import triton
import triton.language as tl
from torch import Tensor

from megasft.quant.kernels import GROUP

BLOCK = 1024
PARTS = 3  # fused along the outputs, at most


def dequantize_scales(
    codes: Tensor, table: Tensor, groups: Tensor, group_of_each: Tensor | None, means: Tensor, starts: list[int]
) -> Tensor:
    """See `megasft.quant.weight`: fp32 [E, N, blocks], with the rounding of torch's product and sum."""
    assert len(starts) <= PARTS
    out = table.new_empty(codes.shape)
    n, blocks = codes.shape[1:]
    first, second = ([*starts[1:], n, n])[:2]
    if codes.numel():
        _scales[(triton.cdiv(codes.numel(), BLOCK),)](
            codes.contiguous(), table, groups.contiguous(), codes if group_of_each is None else group_of_each,
            means.contiguous(), out, codes.numel(), n * blocks, blocks, groups.shape[1], means.shape[1], first, second,
            group_of_each is None, GROUP, BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["total"])
def _scales(codes, table, groups, at, means, out, total, each, blocks, width, parts, first, second,
            CONSECUTIVE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < total
    matrix, j = i // each, i % each
    row = j // blocks
    if CONSECUTIVE:
        group = j // GROUP
    else:
        group = tl.load(at + j, mask=real, other=0)
    part = (row >= first).to(tl.int32) + (row >= second).to(tl.int32)
    value = tl.load(table + tl.load(codes + i, mask=real, other=0).to(tl.int32))
    value = value * tl.load(groups + matrix * width + group, mask=real, other=0.0)
    value = value + tl.load(means + matrix * parts + part, mask=real, other=0.0)
    tl.store(out + i, value, mask=real)
