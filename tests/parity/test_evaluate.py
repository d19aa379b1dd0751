"""An evaluation's losses are the trainer's, its answers those of transformers + peft, under any topology."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megasft.adapters.export import export_adapter
from megasft.config.values import ALL_LINEAR
from megasft.data.tokenizer import load_tokenizer
from tests.parity.peft_adapters import base_model, loaded_by_peft
from tests.parity.reference import random_adapter, tiny_config, write_adapter
from tests.support import on_ranks
from tests.support.world import make_world

NEW = 6
TEMPLATE = Path(__file__).parents[1] / "unit" / "templates" / "xml_calls.jinja"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"type": "integer"}}}}}  # fmt: skip


def conversation(number: int) -> dict:
    """Two to four turns of the assistant, of which the first calls and the second is not to be learned. From 100 on the
    third is so long that it is cut.
    """
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": number}}}
    messages = [
        {"role": "user", "content": f"what is at {number}?"},
        {"role": "assistant", "content": "hm" * (number % 2), "tool_calls": [call]},
        {"role": "tool", "content": "w" * number},
        {"role": "assistant", "content": f"{number} w", "loss": False},
        *(
            {"role": role, "content": f"and {i}" * (1 if role == "user" or number < 100 else 99)}
            for i in range(number % 3)
            for role in ("user", "assistant")
        ),
    ]
    return {"messages": messages, "tools": [TOOL]}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A job with an adapter and a validation file of conversations with tools; one is too long."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_world(folder)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE.read_text())
    write_adapter(random_adapter(tiny_config(vocab_size=264, mlp_only_layers=[]), 4, frozenset(ALL_LINEAR)), folder / "plain", 4, 8)  # fmt: skip
    export_adapter(folder / "plain", folder / "adapter", "per-expert", str(folder / "model"))
    lines = [conversation(number) for number in (1, 2, 3, 4, 200, 5)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluated(ranks, world: Path, count: int, *overrides: str) -> list[dict]:
    given = [f'job.init_adapter="{world}/adapter"', "hyperparameters.sequence_length=1024", *overrides]
    return ranks(count, on_ranks.evaluation, world / "job.toml", given, "all", NEW)


@pytest.fixture(scope="module")
def alone(ranks, world) -> dict:
    return evaluated(ranks, world, 1)[0]


def test_losses_are_those_of_the_trainers_validation(alone):
    for side in ("base", "adapter"):
        loss, tokens, accuracy = alone["trained"][side]
        # fp32 sums of the same losses: a batch's sum there, fp64 sums of single ones here
        assert alone["values"]["loss"][side] == pytest.approx(loss, rel=1e-6)
        assert alone["values"]["perplexity"][side] == pytest.approx(math.exp(loss), rel=1e-5)
        assert alone["values"]["token_accuracy"][side] == pytest.approx(accuracy, abs=1e-9)
        assert alone["counts"]["loss"] == tokens
    assert alone["values"]["loss"]["base"] != pytest.approx(alone["values"]["loss"]["adapter"], abs=1e-3)


def test_parts_are_those_of_the_conversations_and_add_up_to_all(alone):
    values, counts = alone["values"], alone["counts"]
    for parts in (["text/loss", "tool_call/loss"], [name for name in values if name.startswith("turn_") and name.endswith("loss")]):  # fmt: skip
        weighted = sum(values[name]["adapter"] * counts[name] for name in parts) / counts["loss"]
        assert weighted == pytest.approx(values["loss"]["adapter"], rel=1e-9)
        assert sum(counts[name] for name in parts) == counts["loss"]
    assert not any(name.startswith("turn_2/") for name in values), "no second turn is to be learned"
    # What the template writes of the calls; bytes are tokens. The conversation that is too long keeps its call.
    called = [f"<tool_call>\n<function=look>\n<parameter=at>\n{n}\n</parameter>\n</function>\n</tool_call>" for n in (1, 2, 3, 4, 200, 5)]  # fmt: skip
    assert counts["tool_call/loss"] == sum(map(len, called))
    by_conversation = alone["losses"]["adapter"][:, 1, 2]
    assert by_conversation.tolist() == list(map(len, called))


def test_greedy_answers_are_those_of_transformers_and_peft(alone, world):
    tokenizer = load_tokenizer(world / "model")
    models = {"base": base_model(world / "model"), "adapter": loaded_by_peft(world / "model", world / "adapter")}
    assert alone["turns"] == [(0, 0), (0, 2), (1, 0), (1, 2), (1, 3), (2, 0), (3, 0), (3, 2), (4, 0), (4, 2), (4, 3), (5, 0), (5, 2), (5, 3)]  # fmt: skip
    for side, model in models.items():
        for prompt, text in list(zip(alone["prompts"], alone["texts"][side], strict=True))[::3]:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                eos_token_id=tokenizer.eos_id, pad_token_id=0,
            )[0, len(prompt) :]  # fmt: skip
            assert text == tokenizer.decode(out[:-1] if out[-1] == tokenizer.eos_id else out)
    assert alone["texts"]["base"] != alone["texts"]["adapter"]


# tensor x data = 2 x 2; experts on ranks of both replicas; stages
@pytest.mark.parametrize(
    ("count", "sizes"),
    [(4, {"tensor_parallel": 2, "data_parallel": 2, "expert_tensor_parallel": 2}),
     (2, {"expert_parallel": 2, "data_parallel": 2}),
     (2, {"pipeline_parallel": 2})],
)  # fmt: skip
def test_results_do_not_depend_on_the_topology(ranks, world, alone, count, sizes):
    overrides = [f"data.topology.{name}={size}" for name, size in sizes.items()]
    overrides += [f"data.topology.{name}=1" for name in ("tensor_parallel", "data_parallel") if name not in sizes]
    found = evaluated(ranks, world, count, *overrides)
    for one in found:
        assert one["texts"] == alone["texts"]
        for side in ("base", "adapter"):
            np.testing.assert_allclose(one["losses"][side], alone["losses"][side], rtol=1e-5)  # fp32 rounding
            assert one["values"]["loss"][side] == pytest.approx(one["trained"][side].loss, rel=1e-6)
    assert found[0]["json"]["metrics"].keys() == alone["json"]["metrics"].keys()


def test_json_says_what_became_of_the_data_and_has_no_nan(alone):
    found = alone["json"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["conversations"], found["skipped"], found["answered_turns"]) == (6, 0, 14)
    assert found["overlong"] == {"truncated": 1, "split": 0, "dropped": 0}
    assert found["tool_call_format"] == "xml"
    loss = found["metrics"]["loss"]
    assert loss["difference"] == pytest.approx(loss["adapter"] - loss["base"])
    assert loss["low"] < loss["difference"] < loss["high"]
