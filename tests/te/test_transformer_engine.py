"""With Transformer Engine installed, layers are made of it and call it as its own Python accepts."""

import inspect

import pytest
import torch

from megasft import host
from megasft.config.schema import HyperparameterSettings, LoraSettings
from megasft.model.attention import PackedAttention, SelfAttention
from megasft.model.batch import Segments
from megasft.model.norm import RMSNorm
from megasft.model.qwen3_moe import _megatron_config
from megasft.train import optimizer
from tests.parity.reference import tiny_config

pytestmark = pytest.mark.te
H, G, D = 32, 4, 128  # query heads, key/value heads and head dimension of the 30B


@pytest.fixture
def config(topology):
    """megatron-core's settings of the 30B's layers, as a GPU gets them."""
    model = tiny_config(
        num_hidden_layers=2,
        hidden_size=2048,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D,
        mlp_only_layers=[],
    )
    return _megatron_config(model, topology.sizes, torch.bfloat16, True, "auto", None)


@pytest.fixture
def layer(config, topology, h200):
    return SelfAttention(config, 1, topology.groups, LoraSettings(dropout=0.0), None)


def test_megatron_core_finds_it():
    from megatron.core.extensions import transformer_engine

    assert transformer_engine.HAVE_TE


def test_a_layer_on_a_gpu_attends_with_it_and_keeps_its_own_norms(layer):
    from transformer_engine.pytorch import DotProductAttention

    assert isinstance(layer.core_attention, DotProductAttention)
    # megasft's norm is frozen and runs on sequence shards; Transformer Engine's is not used.
    assert type(layer.q_layernorm) is type(layer.k_layernorm) is RMSNorm
    assert layer.q_layernorm.weight.is_cuda


def test_a_deterministic_run_takes_torchs_kernel(config, topology, h200, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    host.packs_attention.cache_clear()
    assert isinstance(
        SelfAttention(config, 1, topology.groups, LoraSettings(dropout=0.0), None).core_attention, PackedAttention
    )


@pytest.mark.parametrize(
    "lengths", [[4096], [1000, 96, 3000], [1] * 5 + [27], [100] * 40], ids=["1", "3", "ones", "40"]
)
def test_the_call_of_a_layer_passes_its_checks(layer, attention_calls, lengths):
    """Through its checks of layout, mask and lengths to the fused kernel, for packed conversations and head 128."""
    tokens = sum(lengths)
    x = torch.empty(tokens, 1, 2048, dtype=torch.bfloat16, device="cuda")
    cos_sin = torch.empty(2, tokens, D, dtype=torch.bfloat16, device="cuda")
    y, _ = layer(x, None, cos_sin, Segments.of(lengths, torch.device("cuda")))
    assert (y.shape, y.dtype, y.is_cuda) == ((tokens, 1, 2048), torch.bfloat16, True)
    asked = attention_calls["asked"]
    assert asked["is_training"]
    assert (asked["max_seqlen_q"], asked["max_seqlen_kv"]) == (max(lengths), max(lengths))
    ran = attention_calls["ran"]
    assert (ran["qkv_layout"], ran["attn_mask_type"], ran["dropout"]) == ("thd_thd_thd", "padding_causal", 0.0)
    assert [tuple(ran[name].shape) for name in "qkv"] == [(tokens, H, D), (tokens, G, D), (tokens, G, D)]
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        assert (tuple(ran[name].shape), ran[name].dtype, ran[name].is_cuda) == ((len(lengths) + 1,), torch.int32, True)


def test_the_optimizer_is_its_fused_adam_with_the_states_that_checkpoints_hold(h200, monkeypatch):
    """megatron-core takes it by itself; `train.optimizer` reads its moments and counts steps in its groups."""
    from megatron.core.optimizer import Adam
    from transformer_engine.pytorch.optimizers import FusedAdam, fused_adam

    assert Adam is FusedAdam
    applied = []
    monkeypatch.setattr(fused_adam, "multi_tensor_applier", lambda *given: applied.append(given))
    master = torch.nn.Parameter(torch.empty(24, device="cuda"))
    hyper = HyperparameterSettings()
    adam = Adam([master], lr=hyper.learning_rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    master.grad = torch.empty_like(master)
    adam.step()
    assert len(applied) == 1
    assert set(optimizer.STATES[1:]) <= adam.state[master].keys()
    assert all(adam.state[master][name].dtype == torch.float32 for name in optimizer.STATES[1:])
    assert adam.param_groups[0]["step"] == 1
    assert "step" not in adam.state[master]


def test_its_attention_takes_the_arguments_that_megatron_core_passes(config):
    """Nothing of the packed sequence is dropped on the way but what is not for attention."""
    from transformer_engine.pytorch import DotProductAttention

    taken = set(inspect.signature(DotProductAttention.forward).parameters)
    described = {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
    assert described <= taken
    assert described <= {
        field for field, value in vars(Segments.of([3, 4], torch.device("cpu"))).items() if value is not None
    }
