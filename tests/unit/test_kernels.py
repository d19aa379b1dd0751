"""megasft's Triton kernels give what torch's operators give, in Triton's interpreter, and compile for sm_90."""

from types import SimpleNamespace

import pytest
import torch

import megasft.quant.weight  # noqa: F401 (registers an operator on CPUs)
from megasft.lora import factors
from megasft.lora.dropout import Dropout, key, share
from megasft.model import copies, routing  # noqa: F401 (they register theirs)
from megasft.model.norm import RMSNorm
from megasft.model.qkv import split_qkv
from megasft.model.swiglu import swiglu
from tests.unit.triton_modules import compiled_for_hopper, load

SCALING = 2.5


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# T rows or those of each expert, K, r, the adapted columns, N, first feature, dtype
CASES = {
    "q, k, v": (70, 96, 16, [(0, 130), (130, 20), (150, 64)], 214, 0, torch.float32),
    "one, a rank that is no power of two": (33, 130, 12, [(3, 65)], 80, 64, torch.float32),
    "experts, some without rows": ([40, 0, 1, 0, 65, 32, 0], 72, 8, [(0, 48), (48, 48)], 96, 0, torch.float32),
    "experts, a large rank and an odd first feature": ([3, 70], 65, 72, [(0, 5), (70, 33)], 103, 7, torch.float32),
    "experts without any row": ([0, 0, 0], 32, 8, [(0, 16)], 16, 0, torch.float32),
    "no row": (0, 32, 8, [(0, 16)], 16, 0, torch.float32),
    "fp16": ([33, 0, 40], 96, 16, [(0, 64), (64, 64)], 128, 32, torch.float16),
}


def close(got, want, dtype):
    # Sums of at most 130 terms, in fp32 in another order; in fp16 torch rounds between products.
    bound = (want.abs().max().item() if want.numel() else 0.0) * (1e-5 if dtype == torch.float32 else 2e-2)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_what_torchs_products_do(monkeypatch, case, dropped):
    rows, k, r, parts, n, first, dtype = CASES[case]
    module = load(monkeypatch, "factors", interpreted=True)
    experts = (len(rows),) if isinstance(rows, list) else ()
    offsets = torch.tensor(rows).cumsum(0).int() if experts else None
    t = sum(rows) if experts else rows
    x, gy, gx = (random(t, size, seed=i).to(dtype) for i, size in enumerate((k, n, k)))
    A = random(*experts, r * len(parts), k, seed=3).to(dtype)
    B = [random(*experts, width, r, seed=4 + i).to(dtype) for i, (_, width) in enumerate(parts)]
    columns = [slice(start, start + width) for start, width in parts]
    starts = [start for start, _ in parts]
    drop = Dropout(torch.arange(t) * 3, key(1, case), first, share(0.3)) if dropped else None
    counters = (drop.counters, drop.key, drop.first, drop.share) if drop else (None, 0, 0, 0)

    h = factors.down(x, A, SCALING, drop, offsets)
    close(module.down(x, A, SCALING, *counters, offsets), h, dtype)
    wide = random(t, n + 7, seed=9).to(dtype)  # rows that do not follow each other
    want = wide.clone()[:, 3 : 3 + n].contiguous()
    factors.add_up(want, h, B, columns, offsets)
    module.add_up(wide[:, 3 : 3 + n], h, B, starts, offsets)
    close(wide[:, 3 : 3 + n], want, dtype)
    gh, gB = factors.up_gradients(gy, h, B, columns, SCALING, offsets)
    close(module.up_gradient_h(gy, B, starts, SCALING, offsets), gh, dtype)
    for got, one in zip(module.up_gradient_B(gy, h, B, starts, offsets), gB, strict=True):
        close(got, one, dtype)
    sums = [torch.ones(one.shape) for one in (*gB, A)]  # fp32
    module.up_gradient_B(gy, h, B, starts, offsets, sums[:-1])
    want = gx.clone()
    gA = factors.down_gradients(want, gh, x, A, drop, offsets)
    close(module.down_gradient_A(gh, x, A, *counters, offsets), gA, dtype)
    module.down_gradient_A(gh, x, A, *counters, offsets, sums[-1])
    for got, one in zip(sums, (*gB, gA), strict=True):
        close((got - 1).to(dtype), one, dtype)
    module.down_gradient_x(gx, gh, A, *counters, offsets)
    close(gx, want, dtype)


def test_columns_between_the_adapted_ones_are_left_alone(monkeypatch):
    module = load(monkeypatch, "factors", interpreted=True)
    y = torch.zeros(5, 100)
    module.add_up(y, torch.ones(5, 32), [torch.ones(10, 16), torch.ones(20, 16)], [0, 70], None)
    assert y[0].nonzero().flatten().tolist() == [*range(10), *range(70, 90)]


LAUNCHES = {  # the types of what is no constant, in the order of the kernel
    "_down": "x:*bf16 A:*bf16 counters:*i64 offsets:*i32 h:*bf16 T K R experts scaling:fp32 key:i64 first share stride",
    "_add_up": "y:*bf16 h:*bf16 b0:*bf16 b1:*bf16 b2:*bf16 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2 experts",
    "_gradient_h": "gy:*bf16 b0:*bf16 b1:*bf16 b2:*bf16 gh:*bf16 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2 experts scaling:fp32",
    "_gradient_B": "gy:*bf16 h:*bf16 g0:*fp32 g1:*fp32 g2:*fp32 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2",
    "_gradient_A": "gh:*bf16 x:*bf16 counters:*i64 offsets:*i32 gA:*fp32 T K R key:i64 first share stride",
    "_gradient_x": "gx:*bf16 gh:*bf16 A:*bf16 counters:*i64 offsets:*i32 T K R experts key:i64 first share stride",
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_kernels_compile_for_hopper_without_spilling(monkeypatch, name):
    module = load(monkeypatch, "factors", interpreted=False)
    constants = {"DROP": True, "ADD": True, "ODD": 0, "GROUPED": True, "E": 128, "BR": 32}
    constants |= {"BM": module.TALL, "BN": module.WIDE, "BK": module.WIDE}
    any_number = ("T", "experts", "key", "first", "share", "scaling")
    ptx = compiled_for_hopper(getattr(module, name), LAUNCHES[name], constants, any_number)
    assert "wgmma" in ptx or "mma.sync" in ptx, "products are of tensor cores"


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(35, 200), (16, 128), (1, 3), (0, 8)])
def test_swiglu_is_what_torch_computes(monkeypatch, rows, width, weighted):
    module = load(monkeypatch, "swiglu", interpreted=True)
    gate_up, gy = random(rows, 2 * width, seed=0), random(rows, width, seed=1)
    weight = random(rows, seed=2) if weighted else None
    inputs = [one.requires_grad_() for one in (gate_up, weight) if one is not None]
    y = swiglu(gate_up, weight)
    want = torch.autograd.grad((y * gy).sum(), inputs)
    with torch.no_grad():
        close(module.swiglu(gate_up, weight), y.detach(), torch.float32)
        g, g_weight = module.gradients(gy, gate_up, weight)
        close(g, want[0], torch.float32)
        assert g_weight.shape == ((rows,) if weighted else (0,))
        if weighted:
            close(g_weight, want[1], torch.float32)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("_forward", "gate_up:*bf16 weight:*fp32 y:*bf16 rows width"),
        ("_backward", "gy:*bf16 gate_up:*bf16 weight:*fp32 g:*bf16 g_weight:*fp32 rows width"),
    ],
)
def test_swiglu_compiles_for_hopper_without_spilling(monkeypatch, name, types):
    module = load(monkeypatch, "swiglu", interpreted=False)
    compiled_for_hopper(
        getattr(module, name), types, {"WEIGHTED": True, "ROWS": module.ROWS, "WIDE": module.WIDE}, ("rows",)
    )


# --- queries, keys and values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "heads", "groups", "d"), [(35, 4, 2, 32), (3, 2, 2, 24), (0, 2, 1, 16)])
def test_queries_and_keys_are_normed_and_rotated_as_torch_does(monkeypatch, tokens, heads, groups, d):
    module = load(monkeypatch, "qkv", interpreted=True)
    qkv = random(tokens, (heads + 2 * groups) * d, seed=0).requires_grad_()
    norms = [RMSNorm(SimpleNamespace(params_dtype=torch.float32), d, 1e-3) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.data = random(d, seed=1 + i)
    angles = random(tokens, d // 2, seed=3).repeat(1, 2)
    cos_sin = torch.stack([angles.cos(), angles.sin()])
    given = (norms[0].weight, norms[1].weight, cos_sin, 1e-3)
    want = split_qkv(qkv, heads, *norms, cos_sin)
    gy = [random(*one.shape, seed=4 + i) for i, one in enumerate(want)]
    (g,) = torch.autograd.grad(want, qkv, gy)
    with torch.no_grad():
        for got, one in zip(module.split(qkv, heads, *given), want, strict=True):
            close(got, one.detach(), torch.float32)
        close(module.gradient(*gy, qkv, *given), g, torch.float32)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("_split", "qkv:*bf16 q_weight:*bf16 k_weight:*bf16 cos_sin:*bf16 q:*bf16 k:*bf16 v:*bf16"),
        ("_gradient", "gq:*bf16 gk:*bf16 gv:*bf16 qkv:*bf16 q_weight:*bf16 k_weight:*bf16 cos_sin:*bf16 g:*bf16"),
    ],
)
def test_so_they_compile_for_hopper_without_spilling(monkeypatch, name, types):
    module = load(monkeypatch, "qkv", interpreted=False)
    constants = {"HALF": 64, "ROWS": module.ROWS, "BLOCK": 64}
    compiled_for_hopper(
        getattr(module, name), f"{types} tokens heads groups eps:fp32", constants, ("tokens", "heads", "groups", "eps")
    )


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_all", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(35, 12, 4), (5, 6, 2), (1, 3, 3), (0, 8, 2)])
def test_tokens_are_routed_as_torch_does(monkeypatch, tokens, experts, k, over_all):
    module = load(monkeypatch, "routing", interpreted=True)
    logits, g = random(tokens, experts, seed=0), random(tokens, k, seed=1)
    weights, chosen = torch.ops.megasft.route(logits, k, over_all)
    got = module.route(logits, k, over_all)
    assert torch.equal(got[1], chosen)
    close(got[0], weights, torch.float32)
    close(module.route_gradient(g, logits, chosen, over_all),
          torch.ops.megasft.route_gradient(g, logits, chosen, over_all), torch.float32)  # fmt: skip
    chosen[::3] = experts  # dropped
    for real in (None, torch.arange(tokens) % 2 == 0):
        counts, want = torch.arange(experts), torch.arange(experts)
        module.count_experts(counts, chosen, real)
        torch.ops.megasft.count_experts(want, chosen, real)
        assert torch.equal(counts, want)


def test_logits_that_are_no_numbers_choose_experts_that_exist(monkeypatch):
    """Their NaN is in the weights, and so in the loss; memory that is not theirs is not touched."""
    module = load(monkeypatch, "routing", interpreted=True)
    logits = torch.tensor([[1.0, 2, 3], [float("nan"), 0, 1], [float("nan")] * 3, [float("-inf")] * 3, [1, 1, 1]])
    weights, chosen = module.route(logits, 2, False)
    assert chosen.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    assert weights.isnan().any(1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("experts", [range(8), range(3, 9)], ids=str)
@pytest.mark.parametrize("tokens", [70, 1, 0])
@pytest.mark.parametrize("programs", [2, 256])
def test_copies_are_sorted_and_summed_as_torch_does(monkeypatch, tokens, experts, programs):
    module = load(monkeypatch, "copies", interpreted=True)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    _, wide = torch.ops.megasft.route(random(tokens, 10, seed=0), 5, False)
    wide[::4, 1] = 10  # dropped
    chosen, places = wide[:, :4], torch.arange(2 * tokens)[::2] + 2**40  # rows that do not follow each other
    n = int(((chosen >= experts.start) & (chosen < experts.stop)).sum())
    given = (experts.start, len(experts), 10, n)
    want = torch.ops.megasft.sort_copies(chosen, places, *given)
    for got, one in zip(module.sort_copies(chosen, places, *given), want, strict=True):
        assert got.dtype == one.dtype
        assert torch.equal(got, one)
    assert module.sort_copies(chosen, None, *given)[3].numel() == 0
    slots = want[1]
    y, weights, back = random(n, 70, seed=1), random(tokens, 9, seed=2)[:, 3:7], random(n, seed=3).double()
    close(module.sum_copies(y, slots), torch.ops.megasft.sum_copies(y, slots), torch.float32)
    assert torch.equal(module.to_copies(weights, slots, n), torch.ops.megasft.to_copies(weights, slots, n))
    assert torch.equal(module.from_copies(back, slots), torch.ops.megasft.from_copies(back, slots))


NUMBERS = "t first local experts tiles programs stride step"


@pytest.mark.parametrize(
    ("module", "name", "types"),
    [
        ("routing", "_route", "logits:*fp32 weights:*fp32 chosen:*i32 tokens experts"),
        ("routing", "_route_gradient", "g:*fp32 logits:*fp32 chosen:*i32 out:*fp32 tokens experts"),
        ("routing", "_count", "counts:*i64 chosen:*i32 real:*i1 tokens experts"),
        ("copies", "_count", "chosen:*i32 counts:*i32 t first local tiles stride"),
        (
            "copies", "_place",
            f"chosen:*i32 places:*i64 counts:*i32 tokens:*i32 slots:*i32 ends:*i32 counters:*i64 {NUMBERS}",
        ),
        ("copies", "_sum", "y:*bf16 slots:*i32 out:*bf16 width"),
        ("copies", "_spread", "values:*fp32 slots:*i32 out:*fp32 n k rows columns"),
        ("copies", "_collect", "values:*fp32 slots:*i32 out:*fp32 n"),
    ],
)  # fmt: skip
def test_routing_compiles_for_hopper_without_spilling(monkeypatch, module, name, types):
    loaded = load(monkeypatch, module, interpreted=False)
    constants = {"K": 8, "OVER_ALL": False, "MASKED": True, "COUNTED": True, "E": 128, "WIDE": 1024}
    constants |= {"ROWS": loaded.ROWS * (4 if (module, name) == ("routing", "_count") else 1)}
    any_number = ("tokens", "t", "first", "tiles", "programs", "n", "stride", "step", "k", "rows", "columns")
    compiled_for_hopper(getattr(loaded, name), types, constants, any_number)


# --- scales of a 4-bit base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [[0], [0, 12], [0, 6, 7]], ids=str)
@pytest.mark.parametrize("consecutive", [True, False])
def test_scales_are_dequantized_to_the_same_bits(monkeypatch, starts, consecutive):
    module = load(monkeypatch, "scales", interpreted=True)
    e, n, blocks = 3, 32, 16  # two groups of 256 a matrix
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (e, n, blocks), dtype=torch.uint8, generator=draw)
    at = None if consecutive else torch.randint(2, (n * blocks,), dtype=torch.int32, generator=draw)
    given = (codes, random(256, seed=1), random(e, 2, seed=2), at, random(e, len(starts), seed=3), starts)
    assert torch.equal(module.dequantize_scales(*given), torch.ops.megasft.dequantize_scales(*given))


def test_scales_compile_for_hopper_without_spilling(monkeypatch):
    module = load(monkeypatch, "scales", interpreted=False)
    types = (
        "codes:*u8 table:*fp32 groups:*fp32 at:*i32 means:*fp32 out:*fp32 total each blocks width parts first second"
    )
    constants = {"CONSECUTIVE": False, "GROUP": 256, "BLOCK": module.BLOCK}
    compiled_for_hopper(
        module._scales, types, constants, ("total", "each", "blocks", "width", "parts", "first", "second")
    )
