"""QLoRA: under every topology, weights are bitwise those of bitsandbytes, and products are correct."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, Qwen3MoeForCausalLM

from megasft import cli
from megasft.adapters.merge import DTYPES, merge_adapter
from megasft.config.schema import QuantSettings
from megasft.lora.functional import frozen_linear, grouped_linear, grouped_lora_linear, lora_linear
from megasft.quant import nf4
from megasft.quant.weight import QuantizedWeight, workspace, workspace_bytes
from megasft.storage.shards import consecutive, part
from tests.parity.quantized import ALPHA, R, config_in_blocks, linears, make, quantized_by_bitsandbytes
from tests.parity.reference import Reference, random_adapter, random_model, write_adapter
from tests.support import on_ranks

LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
TOPOLOGIES = {
    "one rank": (1, {}, {}),
    "one rank, three experts at once": (1, {}, {"experts_at_once": 3}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2-etp1": (2, {"tensor_parallel": 2, "expert_tensor_parallel": 1}, {"experts_at_once": 8}),
    "ep2": (2, {"expert_parallel": 2}, {}),
    "tp2-ep2": (2, {"tensor_parallel": 2, "expert_parallel": 2}, {"experts_at_once": 2}),
    "tp4-ep2-etp2": (4, {"tensor_parallel": 4, "expert_parallel": 2, "expert_tensor_parallel": 2}, {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("quantized"))


def cut(settings: dict, name: str) -> tuple[int, dict]:
    ranks, topology, quant = TOPOLOGIES[name]
    data = ranks // topology.get("tensor_parallel", 1)
    return ranks, settings | {
        "data": {"topology": topology},
        "quant": settings["quant"] | quant,
        "hyperparameters": settings["hyperparameters"] | {"per_device_batch": 8 // data},
    }


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_quantized_weights_are_bitwise_those_of_bitsandbytes_under_every_topology(ranks, world, name):
    settings, model, _ = world
    size, settings = cut(settings, name)
    want = linears(model)
    missing = {key: torch.ones(matrix.shape, dtype=torch.bool) for key, matrix in want.items()}
    for answer in ranks(size, on_ranks.dequantized, settings):
        for key, (index, matrix) in answer.items():
            assert torch.equal(matrix, want[key][index]), key
            missing[key][index] = False
    assert not any(left.any() for left in missing.values())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_loss_and_every_lora_gradient_equal_those_over_the_dequantized_weights(ranks, world, name):
    settings, model, adapter = world
    size, settings = cut(settings, name)
    reference = Reference(model, adapter, ALPHA / R)
    samples = on_ranks.random_samples(203, LENGTHS)
    want = reference.loss(samples)
    grads = dict(zip(reference.adapter, torch.autograd.grad(want, list(reference.adapter.values())), strict=True))
    answers = ranks(size, on_ranks.gradients, settings, samples)
    for loss, _, _ in answers:
        assert loss == pytest.approx(want.item(), rel=1e-5)
    got = on_ranks.assemble([parts for *_, parts in answers], {k: v.shape for k, v in adapter.items()})
    for key, grad in grads.items():
        # As over a dense base: the weights are the same bits, so only the order of fp32 sums differs.
        assert (got[key] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, key


def test_logits_of_dense_layers_equal_those_of_transformers_with_bitsandbytes(ranks, tmp_path):
    settings, *_ = make(tmp_path, mlp_only_layers=[0, 1, 2])
    samples = on_ranks.random_samples(203, LENGTHS)
    settings |= {
        "lora": {"r": R, "alpha": ALPHA, "target_modules": ["q_proj"]},
        "job": {"model": settings["job"]["model"]},
    }
    (got,) = ranks(1, on_ranks.logits, settings, samples)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = Qwen3MoeForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    theirs.train()  # else bitsandbytes multiplies in bf16 on CPUs that can, whatever it is asked for
    with torch.no_grad():
        want = torch.cat([theirs(ids[None]).logits[0] for ids, _ in samples])
    # fp32 rounding over three layers, as over a dense base; a fresh adapter adds nothing.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --- one layer ---------------------------------------------------------------------------------------------------------

N, K, EXPERTS, RANK = 96, 256, 6, 8
COUNTS = [0, 5, 32, 0, 0, 7]  # rows of each expert


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantized(
    experts: int, dtype: torch.dtype, settings: QuantSettings, rank: int = 0, size: int = 1, row: bool = False
):
    """(a QuantizedWeight of two fused parts, its values as a dense [E, 2 N, K] in `dtype`)."""
    rows, inputs = slice(0, N) if row else part(N, rank, size), part(K, rank, size) if row else slice(0, K)
    weight = QuantizedWeight(experts, {"a": (N, rows), "b": (N, rows)}, K, inputs, dtype, settings)
    dense = torch.empty(weight.shape, dtype=dtype)
    for e in range(experts):
        for i, (name, at) in enumerate(zip("ab", consecutive([rows.stop - rows.start] * 2), strict=True)):
            whole = nf4.quantize(random(N, K, scale=K**-0.5, seed=2 * e + i), settings, name)
            weight.slot(e, name).fill(whole)
            dense[e, at] = nf4.dequantize(whole, settings, dtype)[rows, inputs]
    return weight, dense


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("rank", "size", "row"), [(0, 1, False), (1, 2, False), (1, 2, True), (3, 4, True), (2, 3, False)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_slice_dequantizes_to_the_slice_of_the_full_matrix(dtype, rank, size, row, double):
    weight, dense = quantized(3, dtype, QuantSettings(double=double), rank, size, row)
    assert torch.equal(weight.dequantize(0, 3), dense)
    assert torch.equal(weight.dequantize(1, 2)[0], dense[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adapted", [True, False])
def test_a_4_bit_linear_layer_equals_one_with_the_dequantized_weight(dtype, adapted):
    weight, dense = quantized(1, dtype, QuantSettings())

    def run(w):
        x = random(40, K).to(dtype).requires_grad_()
        A, B = (
            random(2 * RANK, K, seed=1).to(dtype).requires_grad_(),
            random(N, RANK, seed=2).to(dtype).requires_grad_(),
        )
        columns = list(consecutive([N, N]))
        y = lora_linear(x, w, A, [B, B], columns, 0.5) if adapted else frozen_linear(x, w)
        y.backward(random(*y.shape, seed=3).to(dtype))
        return [y, x.grad, *([A.grad, B.grad] if adapted else [])]

    for got, want in zip(run(weight), run(dense[0]), strict=True):
        assert torch.equal(got, want)  # the same products of the same numbers


@pytest.mark.parametrize("counts", [COUNTS, COUNTS[::-1]], ids=["first expert idle", "last expert idle"])
@pytest.mark.parametrize("at_once", [None, 1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adapted", [True, False])
def test_4_bit_experts_equal_experts_with_the_dequantized_weights(dtype, adapted, at_once, counts):
    weight, dense = quantized(EXPERTS, dtype, QuantSettings(experts_at_once=at_once))
    offsets = torch.tensor(counts).cumsum(0).int()

    def run(w):
        x = random(int(offsets[-1]), K).to(dtype).requires_grad_()
        A = random(EXPERTS, 2 * RANK, K, scale=0.1, seed=1).to(dtype).requires_grad_()
        B = random(EXPERTS, N, RANK, seed=2).to(dtype).requires_grad_()
        columns = list(consecutive([N, N]))
        y = grouped_lora_linear(x, w, A, [B, B], columns, 0.5, offsets) if adapted else grouped_linear(x, w, offsets)
        y.backward(random(*y.shape, seed=3).to(dtype))
        return [y, x.grad, *([A.grad, B.grad] if adapted else [])]

    for got, want in zip(run(weight), run(dense), strict=True):
        # One GEMM an expert or one for all: sums of 256 and 192 products in another order, then one rounding.
        bound = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want, rtol=bound, atol=bound * want.detach().abs().max().item())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rank", "size", "row"), [(0, 1, False), (1, 2, False), (1, 2, True)])
def test_a_rank_holds_the_bytes_of_the_formula(double, rank, size, row):
    settings = QuantSettings(double=double)
    n, k = 768, 2048
    rows, inputs = slice(0, n) if row else part(n, rank, size), part(k, rank, size) if row else slice(0, k)
    weight = QuantizedWeight(4, {"gate": (n, rows), "up": (n, rows)}, k, inputs, torch.bfloat16, settings)
    numel = weight.shape[0] * weight.shape[1] * weight.shape[2]
    # Split along its inputs, a matrix takes whole groups on every rank: 4 bytes for 256 blocks, not for half of them.
    assert abs(weight.nbytes / numel / nf4.bytes_per_weight(settings) - 1) <= 1e-3
    assert weight.nbytes / numel <= (0.53 if double else 0.57)


def test_only_experts_with_rows_are_dequantized_and_no_more_at_once_than_asked(monkeypatch):
    weight, _ = quantized(EXPERTS, torch.float32, QuantSettings(experts_at_once=2))
    seen = []
    dequantize = weight.dequantize
    monkeypatch.setattr(weight, "dequantize", lambda first, last: seen.append((first, last)) or dequantize(first, last))
    offsets = torch.tensor([4, 4, 6, 9, 11, 11]).int()
    grouped_linear(random(11, K), weight, offsets)
    assert seen == [(0, 1), (2, 4), (4, 5)]


@pytest.mark.parametrize(
    ("n", "k", "runs"),
    [(2**14, 2**15, [(0, 3), (3, 6)]), (2**14 + 1, 2**16, [(e, e + 1) for e in range(6)]), (2**10, 2**10, [(0, 6)])],
)
def test_no_more_weights_are_dequantized_at_once_than_an_int32_counts(monkeypatch, n, k, runs):
    weight, _ = quantized(EXPERTS, torch.float32, QuantSettings(experts_at_once=EXPERTS))
    monkeypatch.setattr(weight, "shape", (EXPERTS, n, k))
    assert list(weight.runs(range(1, EXPERTS + 1))) == runs


def test_the_workspace_is_as_large_as_the_largest_product_and_stays(monkeypatch):
    weight, _ = quantized(EXPERTS, torch.float32, QuantSettings(experts_at_once=3))
    monkeypatch.setattr("megasft.quant.weight._workspaces", {})
    for _ in range(3):
        grouped_linear(random(60, K), weight, torch.arange(10, 70, 10).int())
    assert workspace_bytes() == 3 * 2 * N * K * 4


def test_a_workspace_that_grows_is_freed_first(monkeypatch):
    monkeypatch.setattr("megasft.quant.weight._workspaces", {})
    old = weakref.ref(workspace(torch.float32, 8)._base)
    assert old() is not None
    empty, alive = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: alive.append(old()) or empty(*args, **kwargs))
    workspace(torch.float32, 16)
    assert alive == [None]


# --- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
def test_merging_onto_the_quantized_base_gives_the_model_that_was_trained(tmp_path, experts):
    *_, adapter = make(tmp_path, num_hidden_layers=2)
    base, out = tmp_path / "base", tmp_path / "merged"
    model = random_model(config_in_blocks(num_hidden_layers=2))
    if experts == "fused":
        for file in base.glob("model*.safetensors*"):
            file.unlink()
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, base / "model.safetensors")
    with torch.no_grad():
        for matrix in linears(model).values():
            matrix.copy_(quantized_by_bitsandbytes(matrix, torch.float32, double=False, block_size=32))
    run_file = tmp_path / "config.toml"
    run_file.write_text(
        "[training]\nuse_qlora = true\n[quant]\ndouble = false\nblock_size = 32\n"
        "[hyperparameters.parallelism]\nbf16 = false\n"
    )
    command = ["merge", str(tmp_path / "adapter"), str(out), "--model", str(base)]
    cli.app([*command, "--onto", "quantized-base", "--config", str(run_file)], standalone_mode=False)
    merged = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = Reference(model, adapter, ALPHA / R)
    ids = torch.arange(40) * 5 % 203
    with torch.no_grad():
        # fp32, the sums in another order.
        torch.testing.assert_close(merged(ids[None]).logits[0], reference.logits(ids), rtol=1e-5, atol=1e-5)


def test_merging_onto_the_quantized_base_leaves_other_tensors_unchanged(tmp_path):
    make(tmp_path, num_hidden_layers=1, mlp_only_layers=[])
    adapter = adapter_of_q(tmp_path, num_hidden_layers=1, mlp_only_layers=[])
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged", onto=QuantSettings(double=False), trained_in="fp32")
    before, after = (tensors(tmp_path / name) for name in ("base", "merged"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight", "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight", "model.layers.0.mlp.gate.weight",
    }  # fmt: skip


@pytest.mark.parametrize(("base", "run"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_merging_onto_the_quantized_base_uses_the_precision_of_the_run(ranks, tmp_path, base, run):
    settings, *_ = make(tmp_path, num_hidden_layers=2)
    model = random_model(config_in_blocks(num_hidden_layers=2)).to(DTYPES[base])
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_of_q(tmp_path, num_hidden_layers=2)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged", "fp32", onto=QuantSettings(), trained_in=run)
    settings["hyperparameters"] = {"parallelism": {"bf16": run == "bf16"}}
    (trained,) = ranks(1, on_ranks.dequantized, settings)
    merged, pairs = tensors(tmp_path / "merged"), load_file(adapter / "adapter_model.safetensors")
    assert sum("lora_A" in key for key in pairs) == 2  # the q_proj of two layers
    assert len(merged) > len(trained) > 2
    for name, value in tensors(tmp_path / "base").items():
        want = trained[name][1].float() if name in trained else value.to(DTYPES[run]).float()
        A, B = (pairs.get(f"base_model.model.{name.replace('weight', f'lora_{matrix}.weight')}") for matrix in "AB")
        if B is not None:
            # The same sums in fp32, a GEMM of another shape.
            torch.testing.assert_close(merged[name], want + ALPHA / R * B @ A, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(merged[name], want), name


def adapter_of_q(folder: Path, **changes) -> Path:
    """An adapter of q_proj only."""
    write_adapter(random_adapter(config_in_blocks(**changes), R, frozenset({"q_proj"})), folder / "of q", R, ALPHA)
    return folder / "of q"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
