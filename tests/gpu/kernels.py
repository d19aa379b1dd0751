"""Single products and kernels of the device against fp32 or bitwise results of the CPU."""

import itertools

import torch

from megasft import host
from megasft.config.schema import QuantSettings
from megasft.lora import factors
from megasft.lora.dropout import Dropout, key, share
from megasft.lora.factors import grouped_mm
from megasft.lora.functional import grouped_lora_linear, lora_linear
from megasft.model.swiglu import swiglu
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
            cases = [(x, weight.transpose(1, 2)), (gy, weight)]
            for a, b in cases:
                a, b = a.to(dtype), b.to(dtype)
                got = grouped_mm(_same_strides(a, place.device), _same_strides(b, place.device), offsets).cpu().float()
                a, b = a.float(), b.float()
                want = torch.cat([a[at] @ b[e] for e, at in enumerate(spans)])
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
    ones = torch.ones(len(counters), 16)
    for k, first in ((768, 0), (384, 384), (33, 5), (1, 0)):
        for p in (0.05, 0.5):
            kept = []
            for device in ("cpu", place.device):
                drop = Dropout(counters.to(device), key(5, "model.layers.0.q"), first, share(p))
                kept.append(torch.zeros(len(counters), k, device=device))
                gh, A = ones.to(device), torch.full((16, k), 1 / 16, device=device)
                factors.down_gradients(kept[-1], gh, kept[-1].clone(), A, drop, None)
            place.same_bits(f"{k} features from {first}, p = {p}", kept[1], kept[0])
            whole = Dropout(counters, key(5, "model.layers.0.q"), 0, share(p))(torch.ones(len(counters), first + k))
            place.same_bits(f"the same as features {first} to {first + k} of a layer", kept[1], whole[:, first:])


def adapters(place: Place) -> None:
    """Layers with LoRA and SwiGLU, forward and backward in bf16, against fp32 on the CPU."""
    k, n, columns = 96, 80, [slice(0, 32), slice(48, 80)]
    for name, rows in {"one layer": None, **ROWS}.items():
        for r, dropped in itertools.product((4, 16, 72), (False, True)):
            if rows is not None and r % 8:
                continue  # ranks of experts are padded to eights
            results = [
                _adapted(device, dtype, rows, k, n, r, columns, dropped)
                for device, dtype in (("cpu", torch.float32), (place.device, torch.bfloat16))
            ]
            for what, want, got in zip(("y", "gx", "gA", "gB", "gB"), *results, strict=True):
                # h is rounded to bf16, and sums of up to 80 rows or columns of it
                place.near(f"{name}, rank {r}{', dropout' if dropped else ''}: {what}", got, want, 2**-5)
    gate_up, weight, gy = (
        _random(77, 2 * 200, seed=0).bfloat16(),
        _random(77, seed=1),
        _random(77, 200, seed=2).bfloat16(),
    )
    results = []
    for device, dtype in (("cpu", torch.float32), (place.device, torch.bfloat16)):
        inputs = [gate_up.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_()]
        y = swiglu(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, gy.to(device, dtype))])
    for what, want, got in zip(("y", "gradient", "of the weight"), *results, strict=True):
        place.near(f"SwiGLU: {what}", got, want, 2**-6)


def _adapted(device: str, dtype: torch.dtype, rows: list[int] | None, k: int, n: int, r: int, columns: list[slice],
             dropped: bool) -> list[torch.Tensor]:  # fmt: skip
    """y and the gradients of x, A and each B of a layer, or of one for each expert, of bf16 values."""
    t, stack = (50, ()) if rows is None else (sum(rows), (len(rows),))

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return _random(*shape, seed=seed).bfloat16().to(device, dtype)

    x, A = draw(t, k, seed=0).requires_grad_(), draw(*stack, 2 * r, k, seed=1).requires_grad_()
    B = [draw(*stack, at.stop - at.start, r, seed=2 + i).requires_grad_() for i, at in enumerate(columns)]
    weight, gy = draw(*stack, n, k, seed=5), draw(t, n, seed=6)
    drop = Dropout(torch.arange(t, device=device), key(5, "q"), 0, share(0.3)) if dropped else None
    if rows is None:
        y = lora_linear(x, weight, A, B, columns, 0.5, drop)
    else:
        offsets = torch.tensor(rows).cumsum(0).int().to(device)
        y = grouped_lora_linear(x, weight, A, B, columns, 0.5, offsets, drop)
    return [y, *torch.autograd.grad(y, (x, A, *B), gy)]


def routing(place: Place) -> None:
    """Top-k, copies of tokens and their sums, queries and keys: against the CPU; whole numbers and copies exactly."""
    from megasft.model.copies import Copies
    from megasft.model.routing import count_experts, gate, top_experts

    t, k, width, places = 333, 8, 200, torch.arange(333) * 3 + 2**40
    x, weight = _random(t, 64, seed=0).bfloat16(), _random(128, 64, seed=1).bfloat16()
    place.near("the router's product", gate(x.to(place.device), weight.to(place.device)), gate(x, weight), FP32)
    logits, back, y = _random(t, 128, seed=2), _random(t, k, seed=3), _random(t, width, seed=4)
    for over_all, here in itertools.product((False, True), (range(128), range(32, 64))):
        results = []
        for device in ("cpu", place.device):
            given = logits.to(device).requires_grad_()
            weights, chosen = top_experts(given, k, over_all)
            (g,) = torch.autograd.grad(weights, given, back.to(device))
            counts = torch.zeros(128, dtype=torch.int64, device=device)
            count_experts(counts, chosen, (torch.arange(t) % 3 > 0).to(device))
            n = int(((chosen >= here.start) & (chosen < here.stop)).sum())
            copies = Copies.of(chosen, here, n, 128, places.to(device))
            whole = [chosen, counts, copies.tokens, copies.slots, copies.ends, copies.counters]
            made, picked = copies.make(y.to(device)), copies.pick(weights.detach())
            results.append((whole, [weights, g, copies.add_up(made), picked, copies._returned(picked)]))
        what = f"{'all' if over_all else 'top-k'}, experts {here.start} to {here.stop}"
        for want, got in zip(*(whole for whole, _ in results), strict=True):
            place.same_bits(f"{what}: whole numbers", got.cpu(), want)
        for want, got in zip(*(numbers for _, numbers in results), strict=True):
            place.near(f"{what}: numbers", got, want, FP32)


def queries(place: Place) -> None:
    """Norm and rotation of queries and keys, forward and backward in bf16, against fp32 on the CPU."""
    from types import SimpleNamespace

    from megasft.model.norm import RMSNorm
    from megasft.model.qkv import split_qkv

    t, heads, groups, d = 77, 8, 2, 128
    qkv = _random(t, (heads + 2 * groups) * d, seed=0).bfloat16()
    gy = [_random(t, n, d, seed=1 + n).bfloat16() for n in (heads, groups, groups)]
    angles = _random(t, d // 2, seed=5).repeat(1, 2)
    cos_sin, results = torch.stack([angles.cos(), angles.sin()]).bfloat16(), []
    for device, dtype in (("cpu", torch.float32), (place.device, torch.bfloat16)):
        norms = [RMSNorm(SimpleNamespace(params_dtype=dtype), d, 1e-6) for _ in range(2)]
        for i, norm in enumerate(norms):
            norm.weight.data = _random(d, seed=6 + i).bfloat16().to(device, dtype)
        given = qkv.to(device, dtype).requires_grad_()
        parts = split_qkv(given, heads, *norms, cos_sin.to(device, dtype))
        results.append([*parts, *torch.autograd.grad(parts, given, [one.to(device, dtype) for one in gy])])
    for what, want, got in zip(("q", "k", "v", "gradient"), *results, strict=True):
        # where the device has no kernel of its own, torch rounds between norm, product and sum
        place.near(f"queries and keys: {what}", got, want, 2**-5)
