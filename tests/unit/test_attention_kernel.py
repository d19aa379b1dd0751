"""A GPU without Transformer Engine is told so, with what installs it."""

import pytest
from megatron.core.extensions import transformer_engine

from megasft import host


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(host, "CUDA", True)
    host.dot_product_attention.cache_clear()
    yield
    host.dot_product_attention.cache_clear()


def test_without_transformer_engine_it_says_so_once_and_takes_sdpa(on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    assert [host.dot_product_attention() for _ in range(3)] == [None] * 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("Transformer Engine is not installed: attention calls PyTorch's SDPA once for each ")
    assert "pip install -e '.[te]'" in said


def test_with_it_its_attention_is_taken_without_a_word(on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    assert host.dot_product_attention() is transformer_engine.TEDotProductAttention
    assert capsys.readouterr().err == ""


def test_on_cpus_there_is_nothing_to_say(monkeypatch, capsys):
    host.dot_product_attention.cache_clear()
    monkeypatch.setattr(host, "CUDA", False)
    assert host.dot_product_attention() is None
    assert capsys.readouterr().err == ""
