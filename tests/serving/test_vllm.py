"""vLLM serves what was trained: its answers are those of transformers + peft, or it is known where they are not."""

import pytest

from tests.serving.conftest import ask

SERVED = ("default", "attention", "experts", "without-router")


@pytest.fixture(scope="module")
def answers(world):
    adapters = {"base": None} | {name: world[name] for name in (*SERVED, "rslora", "full", "router")}
    return ask("in_vllm.py", world["base"], adapters, world["vllm"], lora=True, route_with_lora=False)


@pytest.mark.parametrize("name", ["base", *SERVED])
def test_an_adapter_without_the_router_is_served_as_it_was_trained(world, answers, name):
    world.assert_served(answers[name], name)
    if name != "base":
        assert world.distance(answers[name], "base") > 0.1, "it would not have shown if the adapter was left out"


def test_rslora_is_served_by_its_formula_and_peft_scales_gate_and_up_by_root_2_more(world, answers):
    """peft 0.21 fuses gate and up to one adapter of 2 r and 2 alpha: alpha / sqrt(r) grows by sqrt(2). If the second
    assertion fails, it has learned better: docs/adapters.md may follow.
    """
    world.assert_served(answers["rslora"], "default")
    assert world.distance(answers["rslora"], "rslora") > 0.1


def test_the_lora_of_the_router_is_left_out_without_a_word(world, answers):
    """If this fails, vLLM has learned it: `all-linear`, SERVED_ROUTER and docs/adapters.md may follow."""
    world.assert_served(answers["router"], "base")
    world.assert_served(answers["full"], "without-router")
    assert world.distance(answers["full"], "full") > 0.1


def test_with_the_router_set_by_hand_all_of_the_adapter_is_served(world):
    adapters = {name: world[name] for name in ("full", "router")}
    answers = ask("in_vllm.py", world["base"], adapters, world["by-hand"], lora=True, route_with_lora=True)
    for name in adapters:
        world.assert_served(answers[name], name)


def test_a_merged_model_is_served_with_the_router(world):
    """On vLLM's own kernel for experts: without LoRA nothing stands in for it."""
    answers = ask("in_vllm.py", world["merged"], {"merged": None}, world["alone"], lora=False, route_with_lora=False)
    world.assert_served(answers["merged"], "full")


def test_the_fused_layout_is_refused(world):
    adapters = {"fused": world["fused"]}
    answers = ask("in_vllm.py", world["base"], adapters, world["vllm-fused"], lora=True, route_with_lora=False)
    assert "contains fused 3D MoE weights" in answers["fused"]
