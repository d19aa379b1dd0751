"""Checkpoints with FP8 weights and one scale per block, as Qwen's -FP8 models have: their weights dequantized.

A linear weight `X` [N, K] is stored as F8_E4M3, with `X_scale_inv` [N / n, K / k], one scale for each block of n x k
weights (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3). The weight is the product of the two. Tensors
without a scale are not quantized.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megasft.messages import UserError
from megasft.storage.shards import Index

BlockSize = tuple[int, int]
SCALE = "_scale_inv"
KEYS = ("quantization_config", "compression_config")  # the second as compressed-tensors wrote it at first
# Keys of `quantization_config`, with the values of this format. Each weight has its scales, whatever is listed there of
# modules that are not quantized; how activations are quantized in serving does not change the weights.
_FORMAT = {"quant_method": ("fp8",), "scale_fmt": (None, "float"), "expert_dtype": (None, "fp8")}


def block_size(config: dict[str, Any]) -> BlockSize | None:
    """(rows, columns) of a block, from the content of config.json; None if the checkpoint is not quantized.

    Raises UserError for any other quantization.
    """
    key = next((key for key in KEYS if config.get(key)), None)
    if key is None:
        return None
    quantization = config[key] if isinstance(config[key], dict) else {}
    wrong = next((key for key, good in _FORMAT.items() if quantization.get(key) not in good), None)
    blocks = quantization.get("weight_block_size")
    if (
        wrong is None
        and isinstance(blocks, list)
        and len(blocks) == 2
        and all(type(n) is int and n > 0 for n in blocks)
    ):
        return blocks[0], blocks[1]
    wrong = wrong or "weight_block_size"
    raise UserError(
        f"{key}: {wrong} = {quantization.get(wrong)!r} is not supported; megasft reads weights in bf16, fp16 and fp32, "
        "and FP8 with one scale per block (quant_method = 'fp8' with weight_block_size); use the model that this one "
        "was quantized from ([training] use_qlora = true quantizes it to 4 bits)"
    )


def dequantize(weight: Tensor, scales: Tensor, index: Index, blocks: BlockSize, dtype: torch.dtype) -> Tensor:
    """The slice `index` of a weight [..., N, K], computed in fp32 and rounded once to `dtype`.

    `weight` is the slice, F8_E4M3 [..., n, k]; `scales` [..., N / block, K / block] belong to the full weight.
    """
    *experts, rows, columns = index
    per_row = scales[tuple(experts)].float()[..., torch.arange(rows.start, rows.stop) // blocks[0], :]
    # 1.3 billion weights per second and core; torch's own conversion makes 0.15.
    wide = _values().index_select(0, weight.view(torch.uint8).int().reshape(-1)).view(weight.shape)
    for block in range(columns.start // blocks[1], -(-columns.stop // blocks[1])):
        begin, end = (min(max(i * blocks[1], columns.start), columns.stop) for i in (block, block + 1))
        wide[..., begin - columns.start : end - columns.start].mul_(per_row[..., block, None])
    return wide.to(dtype)


@functools.cache
def _values() -> Tensor:
    """fp32 [256]: the value of each F8_E4M3 number."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
