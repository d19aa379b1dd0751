"""Single products and kernels of the device against fp32 or bitwise results of the CPU."""

import itertools

import torch

from megasft import host
from megasft.config.schema import QuantSettings
from megasft.lora.dropout import Dropout, key, share
from megasft.lora.functional import grouped_mm
from megasft.quant import kernels, nf4
from tests.gpu.place import Place

# A result is rounded once to bf16, which has 8 bits: 2^-8 of its size; sums are in fp32.
BF16, FP32 = 2**-7, 1e-5
ROWS = {
    "none": [0, 0, 0, 0],
    "one": [0, 1, 0, 0],
    "odd": [5, 0, 9, 3],
    "all in the last": [0, 0, 0, 77],
    "even": [32] * 4,
}


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(place: Place) -> None:
    """Every layout of grouped products that a step has, with groups and whole inputs that are empty."""
    k, n = 64, 96
    for dtype, bound in ((torch.bfloat16, BF16), (torch.float32, FP32)):
        for rows_name, rows in ROWS.items():
            offsets = torch.tensor(rows).cumsum(0).int().to(place.device)
            ends = [0, *offsets.tolist()]
            spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
            x, gy = _random(ends[-1], k, seed=0), _random(ends[-1], n, seed=1)
            weight, worst = _random(len(rows), n, k, seed=2), 0.0
            cases = [("x W^T", x, weight.transpose(1, 2)), ("gy W", gy, weight)]
            for r in (4, 8, 16):
                padded = -(-r // 8) * 8
                A, h = _random(len(rows), padded, k, seed=r), _random(ends[-1], padded, seed=r + 1)
                B = _random(len(rows), n, padded, seed=r + 2)
                cases += [
                    ("x A^T", x, A.transpose(1, 2)),
                    ("h B^T", h, B.transpose(1, 2)),
                    ("gy B", gy, B),
                    ("gh A", h, A),
                ]
                cases += [("gy^T h", gy.t(), h), ("gh^T x", h.t(), x)]
            for _, a, b in cases:
                a, b = a.to(dtype), b.to(dtype)
                got = grouped_mm(_same_strides(a, place.device), _same_strides(b, place.device), offsets).cpu().float()
                a, b = a.float(), b.float()
                if b.dim() == 3:
                    want = torch.cat([a[at] @ b[e] for e, at in enumerate(spans)])
                else:
                    want = torch.stack([a[:, at] @ b[at] for at in spans])
                assert got.shape == want.shape
                if want.numel():
                    worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp_min(1e-6)))
            place.at_most(f"{len(cases)} products, {str(dtype)[6:]}, rows of experts {rows_name}", worst, bound)


def _same_strides(t: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, row-major or column-major as it is."""
    if t.dim() > 1 and not t.is_contiguous():
        return t.transpose(-2, -1).contiguous().to(device).transpose(-2, -1)
    return t.to(device)


def four_bits(place: Place) -> None:
    """NF4 codes dequantized on the device, bit for bit the values of the table, for experts and for one matrix."""
    for dtype in (torch.bfloat16, torch.float32):
        for double in (True, False):
            settings = QuantSettings(double=double)
            w = _random(256, 512, seed=3).mul_(0.02).bfloat16()
            codes = nf4.quantize(w, settings, "w")
            scales = codes["scales"]
            if double:
                groups = codes["groups"].repeat_interleave(nf4.GROUP)[: scales.numel()].view(scales.shape)
                scales = nf4.DYNAMIC[scales.long()].mul(groups).add(codes["mean"])
            pairs = torch.stack([codes["packed"] >> 4, codes["packed"] & 15], dim=-1).flatten(1).long()
            want = (nf4.NF4[pairs].view(256, -1, 64) * scales[..., None]).view(256, 512).to(dtype)
            out = torch.empty(256, 512, dtype=dtype, device=place.device)
            kernels.dequantize_nf4(codes["packed"].to(place.device), scales.contiguous().to(place.device), out, 64)
            place.same_bits(f"{str(dtype)[6:]}, double quantization {double}", out, want)


def attention(place: Place) -> None:
    """Each attention kernel of the device against masked attention in fp32 on the CPU, forward and backward."""
    from megasft.model.batch import Segments  # imports megatron-core, which takes seconds

    h, g, d = 16, 2, 128
    packings = {"1": [130], "3": [64, 1, 65], "40": [3 + i % 7 for i in range(40)]}
    packings["3 and padding"] = [100, 27, 3]
    for name, lengths in packings.items():
        inputs = [_random(sum(lengths), heads, d, seed=heads + i).bfloat16() for i, heads in enumerate((h, g, g))]
        upstream = _random(sum(lengths), h, d, seed=7).bfloat16()
        want = _masked([t.float() for t in inputs], lengths, upstream.float())
        for kernel in _kernels(place, h, g, d):
            ours = [t.to(place.device).requires_grad_() for t in inputs]
            segments = Segments.of(lengths, torch.device(place.device))
            y = segments.attend(1, *ours, kernel).view(sum(lengths), h, d)
            got = [y, *torch.autograd.grad(y, ours, upstream.to(place.device))]
            for what, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
                # bf16 probabilities and products of up to 130 terms, summed over the heads of a group in dk and dv
                place.near(f"{type(kernel).__name__}, segments {name}: {what}", a, b, 2**-5)


def _kernels(place: Place, h: int, g: int, d: int) -> list[torch.nn.Module]:
    from megasft.model.attention import PackedAttention, SegmentedAttention

    found: list[torch.nn.Module] = [SegmentedAttention()]
    if place.device == "cuda":
        found.append(PackedAttention())
        if (engine := host.dot_product_attention()) is not None:
            found.append(_transformer_engine(engine, h, g, d))
    return found


def _transformer_engine(engine: type, h: int, g: int, d: int) -> torch.nn.Module:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megasft.config.parallelism import TopologySizes
    from megasft.distributed.topology import join_world

    groups = join_world(TopologySizes(1, 1, 1, 1, 1), 0).groups
    config = TransformerConfig(
        num_layers=1, hidden_size=h * d, num_attention_heads=h, num_query_groups=g, kv_channels=d,
        attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip
    return engine(config, 1, AttnMaskType.padding_causal, "self", pg_collection=groups)


def _masked(inputs: list[torch.Tensor], lengths: list[int], upstream: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = (t.requires_grad_() for t in inputs)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (segment[:, None] == segment) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
    y = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    return [y, *torch.autograd.grad(y, (q, k, v), upstream)]


def dropout(place: Place) -> None:
    """The elements that the device drops are those of the CPU, for shards too."""
    counters = torch.cat([torch.arange(300), torch.tensor([2**40, 2**62])])
    for k, first in ((768, 0), (384, 384), (33, 5), (1, 0)):
        for p in (0.05, 0.5):
            x = _random(len(counters), k, seed=k).bfloat16()
            on_cpu = Dropout.of(counters, key(5, "model.layers.0.q"), first, share(p))(x)
            here = Dropout.of(counters.to(place.device), key(5, "model.layers.0.q"), first, share(p))(
                x.to(place.device)
            )
            place.same_bits(f"{k} features from {first}, p = {p}", here, on_cpu)
        whole = Dropout.of(counters, key(5, "q"), 0, share(0.5))(torch.ones(len(counters), first + k))[:, first:]
        cut = Dropout.of(counters.to(place.device), key(5, "q"), first, share(0.5))
        place.same_bits(
            f"the same as features {first} to {first + k} of a layer",
            cut(torch.ones(len(counters), k, device=place.device)),
            whole,
        )
