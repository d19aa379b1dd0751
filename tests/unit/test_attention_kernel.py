"""Which attention kernel a GPU gets, and that torch's packed one is asked for causal attention within each segment."""

import pytest
import torch
from megatron.core.extensions import transformer_engine
from torch.nn.attention import varlen  # noqa: F401 (it registers the operator that the tests give a CPU kernel)

from megasft import host
from megasft.model.attention import PackedAttention, SegmentedAttention
from megasft.model.batch import Segments

CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch):
    """A host that says it has an H200, asked anew."""
    monkeypatch.setattr(host, "CUDA", True)
    monkeypatch.setattr(host, "own_gpu", lambda: ("NVIDIA H200", (9, 0)))
    for function in (host.dot_product_attention, host.packs_attention):
        function.cache_clear()
    yield monkeypatch
    for function in (host.dot_product_attention, host.packs_attention):
        function.cache_clear()


def test_transformer_engine_is_taken_where_it_is_installed(on_gpu, capsys):
    on_gpu.setattr(transformer_engine, "HAVE_TE", True)
    assert host.dot_product_attention() is transformer_engine.TEDotProductAttention
    assert capsys.readouterr().err == ""


def test_without_it_torch_packs_in_bf16(on_gpu, capsys):
    assert not transformer_engine.HAVE_TE, "the test environment is without Transformer Engine, as megatron-core says"
    assert host.dot_product_attention() is None
    assert host.packs_attention(torch.bfloat16, 128)
    assert capsys.readouterr().err == ""


def test_a_deterministic_run_goes_without_it_and_says_so(on_gpu, capsys):
    on_gpu.setattr(transformer_engine, "HAVE_TE", True)
    on_gpu.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [host.dot_product_attention() for _ in range(3)] == [None] * 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("[job] deterministic = true: attention is torch's, for Transformer Engine's ")


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "why"),
    [
        (("NVIDIA H200", (9, 0)), torch.float32, 128, "they compute in 16 bits, not in float32"),
        (
            ("Tesla V100-SXM2-16GB", (7, 0)),
            torch.bfloat16,
            128,
            "Tesla V100-SXM2-16GB is older than compute capability 8.0",
        ),
        (("NVIDIA H200", (9, 0)), torch.bfloat16, 12, "a head dimension of 12 is no multiple of 8 up to 256"),
    ],
)
def test_what_it_cannot_pack_is_said_once(on_gpu, capsys, gpu, dtype, head_dim, why):
    on_gpu.setattr(host, "own_gpu", lambda: gpu)
    assert not any(host.packs_attention(dtype, head_dim) for _ in range(3))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("attention calls PyTorch's SDPA once for each conversation")
    assert said.endswith(f": {why}\n")


def test_on_cpus_there_is_nothing_to_say(capsys):
    host.dot_product_attention.cache_clear()
    assert host.dot_product_attention() is None
    assert not host.packs_attention(torch.float32, 128)
    assert capsys.readouterr().err == ""


LENGTHS = [5, 1, 12, 3]


def _heads(device, dtype=torch.float32):
    """q with four heads and, cut out of one tensor as in a layer, k and v with two."""
    q, kv = torch.randn(2, sum(LENGTHS), 4 * 16, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    return q.view(-1, 4, 16), *(part.unflatten(-1, (2, 16)) for part in kv.split(32, dim=-1))


@pytest.fixture
def kernel_on_cpu():
    """torch's packed attention on CPUs, as its documentation defines the operator; it has a kernel for CUDA only."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, gqa, used=None, table=None, splits=None):
        assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
        assert max_q == max_k == max(LENGTHS)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if gqa else t for t in (k, v))
        segment = torch.arange(len(cu_q) - 1).repeat_interleave(cu_q.diff())
        at = torch.arange(len(q))
        behind = at[:, None] - at
        seen = segment[:, None] == segment
        seen &= (window[0] < 0) | (behind <= window[0])
        seen &= (window[1] < 0) | (behind >= -window[1])
        seen &= behind >= 0 if is_causal else seen
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill(~seen, -torch.inf)
        return (
            torch.einsum("hqk,khd->qhd", scores.softmax(-1), v),
            scores.logsumexp(-1),
            torch.zeros(2, dtype=torch.uint64),
        )

    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", attend, "CPU", allow_override=True)
        yield


def test_packed_attention_is_that_of_each_segment_alone(kernel_on_cpu):
    q, k, v = _heads(CPU)
    given = q, k, v, None, None, Segments.of(LENGTHS, CPU)
    # fp32 sums of at most 12 terms in another order.
    torch.testing.assert_close(PackedAttention()(*given), SegmentedAttention()(*given), rtol=1e-5, atol=1e-6)


def test_packed_attention_has_a_backward():
    """On tensors without data, through torch's own shapes: the gradient of each input has the input's shape."""
    inputs = [t.requires_grad_() for t in _heads("meta", torch.bfloat16)]
    y = PackedAttention()(*inputs, None, None, Segments.of(LENGTHS, torch.device("meta")))
    assert (y.shape, y.dtype) == (inputs[0].shape, torch.bfloat16)
    gradients = torch.autograd.grad(y, inputs, torch.empty_like(y))
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
