"""Our NF4 codes and values are bitwise those of bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch

from megasft.config.schema import QuantSettings
from megasft.messages import UserError
from megasft.quant import nf4

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def weights(dtype: torch.dtype, std: float = 0.02, shape: tuple[int, int] = (48, 512), seed: int = 0) -> torch.Tensor:
    """Normal weights with special cases: blocks of zeros, of one value, with one spike, and negative zeros."""
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)
    w[1, :256], w[2], w[3, 64:], w[3, 70], w[4, :64] = 0, w[2, 0], 0, -std, -0.0
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("block_size", "shape"), [(64, (48, 512)), (32, (48, 512)), (128, (48, 512)), (64, (5, 192))])
def test_codes_scales_and_values_are_those_of_bitsandbytes(dtype, double, block_size, shape):
    settings = QuantSettings(double=double, block_size=block_size)
    w = weights(dtype, shape=shape)
    codes, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=double)
    ours = nf4.quantize(w, settings, "w")
    assert torch.equal(ours["packed"].flatten(), codes.flatten())
    assert torch.equal(ours["scales"].flatten(), state.absmax)
    if double:
        assert torch.equal(ours["groups"], state.state2.absmax)
        assert torch.equal(ours["mean"], state.offset)
        assert torch.equal(nf4.DYNAMIC, state.state2.code)
    for target in (torch.bfloat16, torch.float32):
        state.dtype = target
        assert torch.equal(nf4.dequantize(ours, settings, target), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("seed", range(4))  # the sums of the orders are often the same number
def test_quantized_values_do_not_depend_on_the_number_of_threads(two_threads, seed):
    w = weights(torch.bfloat16, shape=(4096, 4096), seed=seed)
    on_two = nf4.quantize(w, QuantSettings(), "w")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    on_one = nf4.quantize(w, QuantSettings(), "w")
    for field, value in on_one.items():
        assert torch.equal(on_two[field], value), field


@pytest.mark.parametrize("std", [1e-41, 1e-38, 1e-35, 1e-8, 1.0, 1e4])
def test_weights_of_any_size_are_quantized_as_bitsandbytes_does(std):
    w = weights(torch.bfloat16, std)
    codes, _ = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(nf4.quantize(w, QuantSettings(), "w")["packed"].flatten(), codes.flatten())


def test_the_bf16_table_equals_the_rule_for_every_weight_and_scale():
    """Every fraction of the largest magnitude, with every smaller weight down to where all become zero."""
    blocks = torch.stack([block for largest in range(0x3F80, 0x4000) for block in _blocks(largest)])
    ours, scales = nf4._quantize_bf16(blocks)
    codes, rule = nf4._quantize_by_rule(blocks)
    assert torch.equal(scales, rule)
    assert torch.equal(ours, codes)
    assert set(ours.unique().tolist()) == set(range(16))


def _blocks(largest: int):
    magnitudes = (largest - torch.arange(8 * 128 + 40)).to(torch.int16).view(torch.bfloat16)
    top = magnitudes[:1]
    for piece in torch.cat([magnitudes, -magnitudes]).split(63):
        yield torch.cat([top, piece, top.new_zeros(63 - len(piece))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("value", "said"), [
    (float("nan"), "values not finite"), (float("inf"), "values not finite"), (-float("inf"), "values not finite"),
    (65536.0, "a weight of 65536, beyond fp16's 65504"), (-1e6, "beyond fp16's"),
])  # fmt: skip
def test_weights_that_cannot_be_quantized_are_refused_by_name(dtype, double, value, said):
    w = weights(dtype)
    w[7, 11] = value
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.0\.x\.weight' holds .*" + said):
        nf4.quantize(w, QuantSettings(double=double), "model.layers.0.x.weight")


@pytest.mark.parametrize("double", [True, False])
def test_bytes_per_weight_equal_the_formula(double):
    settings = QuantSettings(double=double)
    n, k = 768, 2048
    quantized = nf4.quantize(weights(torch.bfloat16, shape=(n, k)), settings, "w")
    used = sum(value.nbytes for value in quantized.values())
    assert used == sum(spec.nbytes for spec in nf4.specs((n, k), settings).values())
    assert abs(used / (n * k) / nf4.bytes_per_weight(settings) - 1) < 1e-3
    if double:
        assert used / (n * k) <= 0.53
