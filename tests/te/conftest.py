"""Transformer Engine's own Python on fake CUDA tensors: its modules are constructed and its argument checks run; of its
compiled kernels, those for attention and Adam are stand-ins that record what they are called with.
"""

import inspect
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megasft import host
from megasft.config.parallelism import TopologySizes
from megasft.distributed.topology import Topology, join_world, leave_world


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """Skip where it is not."""
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed; `make test-te` installs it")


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    """A world of one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    yield join_world(TopologySizes(1, 1, 1, 1, 1), seed=0)
    leave_world()


@pytest.fixture
def h200(topology, monkeypatch) -> Iterator[None]:
    """An H200 that holds no numbers: within it, tensors on CUDA have shapes, strides and types."""
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, name="NVIDIA H200"
    )
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", property(lambda _: True), raising=False)
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(host, "CUDA", True)
    host.dot_product_attention.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    host.dot_product_attention.cache_clear()


@pytest.fixture
def attention_calls(monkeypatch) -> dict[str, Any]:
    """What Transformer Engine asks its compiled attention: `asked`, whether a fused kernel takes it; `ran`, the kernel.

    The answer is that of cuDNN 9.20 on sm_90: the kernel for sequences of any length.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import backends, dot_product_attention, utils

    calls: dict[str, Any] = {}

    def asked(**question: Any) -> tuple[int, str]:
        calls["asked"] = question
        return int(utils.FusedAttnBackend["F16_arbitrary_seqlen"]), ""

    signature = inspect.signature(backends.fused_attn_fwd)

    def ran(*given: Any, **named: Any) -> tuple:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        calls["ran"] = bound.arguments
        q = bound.arguments["q"]
        statistics = torch.empty(q.shape[0], q.shape[1], 1, dtype=torch.float32, device="cuda")
        return torch.empty_like(q), [statistics, torch.empty(2, dtype=torch.int64, device="cuda")]

    monkeypatch.setattr(utils, "_get_fused_attn_backend", asked)
    monkeypatch.setattr(backends, "fused_attn_fwd", ran)
    for module in (utils, backends, dot_product_attention):
        if hasattr(module, "get_device_compute_capability"):
            monkeypatch.setattr(module, "get_device_compute_capability", lambda: (9, 0))
    choose = dot_product_attention.dpa_utils.get_attention_backend

    def as_tensors(parameters: Any) -> Any:
        parameters.qkv_type = torch.Tensor  # it compares the class, and fake tensors have one of their own
        return choose(parameters)

    monkeypatch.setattr(dot_product_attention.dpa_utils, "get_attention_backend", as_tensors)
    monkeypatch.setitem(dot_product_attention._attention_backends, "backend_selection_requires_update", True)
    monkeypatch.setitem(dot_product_attention._attention_backends, "attention_params", None)
    return calls
