"""The Triton kernels of LoRA's factors give what torch's products give: in Triton's interpreter; and compile for sm_90."""

import importlib
import sys

import pytest
import torch

from megasft.lora import factors
from megasft.lora.dropout import Dropout, key, share

SCALING = 2.5


@pytest.fixture
def kernels(monkeypatch):
    """`kernels(interpreted)`: the module, whose functions take tensors of the CPU if interpreted."""

    def load(interpreted):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        for name in ("kernels", "factor_kernels"):
            monkeypatch.delitem(sys.modules, f"megasft.lora.{name}", raising=False)
        return importlib.import_module("megasft.lora.factor_kernels")

    yield load
    for name in ("kernels", "factor_kernels"):
        sys.modules.pop(f"megasft.lora.{name}", None)


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
def test_the_kernels_compute_what_torchs_products_do(kernels, case, dropped):
    rows, k, r, parts, n, first, dtype = CASES[case]
    module = kernels(interpreted=True)
    experts = (len(rows),) if isinstance(rows, list) else ()
    offsets = torch.tensor(rows).cumsum(0).int() if experts else None
    t = sum(rows) if experts else rows
    x, gy, gx = (random(t, size, seed=i).to(dtype) for i, size in enumerate((k, n, k)))
    A = random(*experts, r * len(parts), k, seed=3).to(dtype)
    B = [random(*experts, width, r, seed=4 + i).to(dtype) for i, (_, width) in enumerate(parts)]
    columns = [slice(start, start + width) for start, width in parts]
    starts = [start for start, _ in parts]
    drop = Dropout.of(torch.arange(t) * 3, key(1, case), first, share(0.3)) if dropped else None
    counters = (drop.rows, drop.first, drop.share) if drop else (None, 0, 0)

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
    want = gx.clone()
    gA = factors.down_gradients(want, gh, x, A, drop, offsets)
    close(module.down_gradient_A(gh, x, A, *counters, offsets), gA, dtype)
    module.down_gradient_x(gx, gh, A, *counters, offsets)
    close(gx, want, dtype)


def test_columns_between_the_adapted_ones_are_left_alone(kernels):
    module = kernels(interpreted=True)
    y = torch.zeros(5, 100)
    module.add_up(y, torch.ones(5, 32), [torch.ones(10, 16), torch.ones(20, 16)], [0, 70], None)
    assert y[0].nonzero().flatten().tolist() == [*range(10), *range(70, 90)]


LAUNCHES = {  # the types of what is no constant, in the order of the kernel
    "_down": "x:*bf16 A:*bf16 rows:*i32 offsets:*i32 h:*bf16 T K R experts scaling:fp32 first share stride",
    "_add_up": "y:*bf16 h:*bf16 b0:*bf16 b1:*bf16 b2:*bf16 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2 experts",
    "_gradient_h": "gy:*bf16 b0:*bf16 b1:*bf16 b2:*bf16 gh:*bf16 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2 experts scaling:fp32",
    "_gradient_B": "gy:*bf16 h:*bf16 g0:*bf16 g1:*bf16 g2:*bf16 offsets:*i32 T R r stride n0 n1 n2 c0 c1 c2",
    "_gradient_A": "gh:*bf16 x:*bf16 rows:*i32 offsets:*i32 gA:*bf16 T K R first share stride",
    "_gradient_x": "gx:*bf16 gh:*bf16 A:*bf16 rows:*i32 offsets:*i32 T K R experts first share stride",
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_kernels_compile_for_hopper_without_spilling(kernels, name):
    module = kernels(interpreted=False)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(module, name)
    types = dict(word.split(":") if ":" in word else (word, "i32") for word in LAUNCHES[name].split())
    given = {
        "DROP": True,
        "ODD": 0,
        "GROUPED": True,
        "E": 128,
        "BM": module.TALL,
        "BN": module.WIDE,
        "BK": module.WIDE,
        "BR": 32,
    }
    names = kernel.arg_names
    constants = {(i,): given[one] for i, one in enumerate(names) if one not in types}
    assert list(types) == names[: len(types)]
    odd = ("T", "experts", "first", "share", "scaling")  # what a launch doesn't know to be a multiple of 16
    multiples = {(i,): [["tt.divisibility", 16]] for i, one in enumerate(names) if one in types and one not in odd}
    source = ASTSource(kernel, types | dict.fromkeys(names[len(types) :], "constexpr"), constants, multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]
    assert "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]
    assert "ld.global.b16" not in compiled.asm["ptx"], "16 bytes are loaded at a time"
