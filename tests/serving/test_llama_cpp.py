"""llama.cpp, through its own converters, answers as transformers + peft do."""

import pytest

from tests.serving.conftest import ask

SERVED = ("default", "attention", "full", "router", "experts", "without-router")


@pytest.fixture(scope="module")
def answers(world):
    adapters = {"base": None} | {name: world[name] for name in (*SERVED, "fused")}
    return ask("in_llama_cpp.py", world["base"], adapters, world["llama.cpp"])


@pytest.mark.parametrize("name", ["base", *SERVED])
def test_an_adapter_is_served_as_it_was_trained_router_included(world, answers, name):
    world.assert_served(answers[name], name)
    if name != "base":
        assert world.distance(answers[name], "base") > 0.1, "it would not have shown if the adapter was left out"


def test_a_merged_model_is_served_with_the_router(world):
    answers = ask("in_llama_cpp.py", world["merged"], {"merged": None}, world["llama.cpp-merged"])
    world.assert_served(answers["merged"], "full")


def test_the_fused_layout_is_refused_by_the_converter(answers):
    assert "Unprocessed experts" in answers["fused"]
