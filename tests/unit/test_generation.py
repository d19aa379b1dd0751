"""Prompts follow the template, text is streamed in complete characters, and sampling follows the options."""

import json
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, Qwen3MoeConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megasft.config.parallelism import TopologySettings
from megasft.data.tokenizer import load_tokenizer
from megasft.generation.prompts import encode, write
from megasft.generation.request import Request, read_tools, template_variables
from megasft.generation.run import _Conversation, stop_tokens
from megasft.generation.sampling import Sampler
from megasft.generation.text import UNFINISHED, TextStream
from megasft.messages import UserError
from megasft.target import find_target
from tests.parity.reference import tiny_config, write_adapter

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine."},
    {"role": "user", "content": "And now, naïve café?"},
]

# --- prompts ---


@pytest.mark.parametrize("template", ["chatml", "thinking", "header_ids", "instruction"])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_prompt_is_what_transformers_makes_of_it(with_template, template, tools):
    tokenizer = with_template(template)
    want = tokenizer.hf.apply_chat_template(TURNS, tools=tools, add_generation_prompt=True, return_dict=False)
    assert encode(tokenizer, TURNS, tools, {}) == want


def test_variables_reach_the_template(with_template):
    template = "{{ messages[0].content }}{% if not thinking %}<think></think>{% endif %}"
    tokenizer = with_template(template)
    texts = [
        tokenizer.decode(encode(tokenizer, [{"role": "user", "content": "hi"}], None, template_variables([argument])))
        for argument in ("thinking=true", "thinking=false")
    ]
    assert texts == ["hi", "hi<think></think>"]


def test_variables_of_the_run_the_record_and_the_command_line_override_in_this_order(with_template, tmp_path):
    tokenizer = with_template("{{ messages[0].content }} {{ a }} {{ b }} {{ c }}")
    record = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"b": "record", "c": "record"}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
    run = {"a": "run", "b": "run", "c": "run"}
    request = Request("m", jsonl=tmp_path / "prompts.jsonl", template={"c": "line"}, run_template=run)
    conversation = _Conversation(request, tokenizer, Qwen3MoeConfig())
    assert tokenizer.decode(conversation.ask()) == "hi run record line"


def test_typed_control_tokens_do_not_close_a_turn(with_template):
    tokenizer = with_template("chatml")
    end = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    ids = encode(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}], None, {})
    assert ids.count(end) == 1
    assert tokenizer.decode(ids).count("<|im_end|>") == 2


def test_what_a_template_refuses_is_one_line(with_template):
    tokenizer = with_template("{{ raise_exception('no\nsystem') if messages[0].role == 'system' else 'x' }}")
    with pytest.raises(UserError, match=r"the chat template fails: no.*system"):
        encode(tokenizer, TURNS, None, {})


def test_invalid_tools_and_variables_are_refused(tmp_path):
    path = tmp_path / "tools.json"
    for text, words in (("{", "not a readable JSON"), ('{"a": 1}', "a list of objects"), ("[]", "a list of objects")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_tools(path)
    path.write_text(json.dumps([TOOL]))
    assert read_tools(path) == [TOOL]
    assert template_variables(["enable_thinking=false", "n=3", "name=x y"]) == {
        "enable_thinking": False,
        "n": 3,
        "name": "x y",
    }
    for argument in ("enable_thinking", "=3", "a b=3"):
        with pytest.raises(UserError, match="must be name=value"):
            template_variables([argument])


# --- text ---


def streamed(tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@QUICK
@example("naïve 你好 😀 é")
@given(st.text(max_size=30))
def test_streamed_text_consists_of_complete_characters_and_is_complete(with_template, sentencepiece_file, text):
    text = text.replace(UNFINISHED, "")
    for tokenizer in (with_template("chatml"), load_tokenizer(sentencepiece_file)):
        ids = tokenizer.hf.encode(text, add_special_tokens=False)
        pieces = streamed(tokenizer, ids)
        assert UNFINISHED not in "".join(pieces)
        assert "".join(pieces) == tokenizer.decode(ids)


@QUICK
@given(st.binary(max_size=12))
def test_invalid_bytes_become_replacement_characters(with_template, data):
    tokenizer = with_template("chatml")
    alphabet = tokenizer.hf.backend_tokenizer.get_vocab()
    from tokenizers.pre_tokenizers import ByteLevel

    letters = {chr(code).encode("utf-8"): letter for code in range(128) for letter in ByteLevel().pre_tokenize_str(chr(code))[0][0][-1:]}  # fmt: skip
    high = [letter for letter in ByteLevel.alphabet() if letter not in letters.values()]
    ids = [alphabet[letters[bytes([b])]] if b < 128 else alphabet[sorted(high)[b - 128]] for b in data]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_complete_character_is_streamed_at_once(with_template):
    tokenizer = with_template("chatml")
    ids = tokenizer.hf.encode("a😀b", add_special_tokens=False)
    assert streamed(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_a_reader_that_has_left_is_one_line(monkeypatch):
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(UserError, match="standard output was closed"):
            write("text")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())  # what is left in the buffer goes there


# --- sampling ---


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 20), (1.5, 0.6, 0), (0.5, 1.0, 3), (1.0, 1e-9, 0), (2.0, 0.9, 1)]
)  # fmt: skip
def test_tokens_are_drawn_as_transformers_would(temperature, top_p, top_k):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(5)) * 2
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)]
    chances = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(0)
    sampler, draws = Sampler(temperature, top_p, top_k, seed=7), 4000
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(draws)]), minlength=40)
    assert not counts[chances == 0].any()
    # A count is binomial: its standard deviation is at most sqrt(draws p). 5 of them, over 40 tokens: one in 40,000.
    assert ((counts - draws * chances).abs() <= 5 * (draws * chances).sqrt() + 1e-3).all()


def test_a_seed_gives_the_same_tokens_and_another_others():
    logits = torch.zeros(100)
    first, again, other = ([Sampler(1.0, seed=seed).choose(logits)] for seed in (1, 1, 2))
    assert first == again != other
    sampler = Sampler(1.0, seed=1)
    assert len({sampler.choose(logits) for _ in range(20)}) > 10, "the draws of one sampler differ"
    assert Sampler().choose(torch.tensor([0.0, 2.0, 1.0])) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
        ({"temperature": 1.0, "top_k": -3}, "top_k = -3"),
        ({"temperature": 1.0, "seed": -1}, "seed = -1"),
        ({"top_p": 0.9}, "set a temperature"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Sampler(**options)


# --- what to run ---


def test_stop_tokens_come_from_all_configuration_files(with_template, tmp_path):
    tokenizer = with_template("chatml")
    ends = {tokenizer.hf.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|end|>")}
    config = Qwen3MoeConfig(eos_token_id=3)
    assert stop_tokens(tmp_path, config, tokenizer) == ends | {3}
    GenerationConfig(eos_token_id=[5, 6]).save_pretrained(tmp_path)
    assert stop_tokens(tmp_path, config, tokenizer) == ends | {3, 5, 6}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json: not a readable"):
        stop_tokens(tmp_path, config, tokenizer)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [({}, 1), ({"tensor_parallel": 2, "data_parallel": 8}, 2), ({"expert_parallel": 4}, 4),
     ({"tensor_parallel": 2, "expert_parallel": 2}, 2), ({"tensor_parallel": 4, "expert_parallel": 2}, 4),
     ({"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}, 4),
     ({"tensor_parallel": 2, "expert_parallel": 3, "pipeline_parallel": 2}, 12)],
)  # fmt: skip
def test_generation_uses_as_few_ranks_as_hold_the_model_once(sizes, ranks):
    request = Request("m", topology=TopologySettings(**sizes))
    assert request.ranks() == ranks
    if "expert_parallel" not in sizes:  # experts are cut as the rest: several GPUs are for their memory
        assert request.sizes(ranks).expert_tensor == sizes.get("tensor_parallel", 1)
    assert request.sizes(ranks).data * request.sizes(ranks).tensor * request.sizes(ranks).pipeline == ranks


@pytest.mark.parametrize(("layout", "r", "rank"), [("per-expert", 4, 8), ("fused", 16, 16), ("per-expert", 17, 32)])
def test_the_vllm_command_names_adapter_and_rank(tmp_path, layout, r, rank):
    from megasft.adapters.export import export_adapter
    from tests.parity.reference import random_adapter

    adapter = random_adapter(tiny_config(mlp_only_layers=[]), r, frozenset({"q_proj", "gate_proj", "up_proj"}))
    write_adapter(adapter, tmp_path / "plain", r, 8)
    folder = tmp_path / "my run" / "adapter"
    export_adapter(tmp_path / "plain", folder, layout, "Qwen/base")
    found = find_target(str(folder))
    command = Request(found.model, found.adapter).vllm_command()
    served = f"vllm serve Qwen/base --enable-lora --lora-modules 'my run={folder}"
    if layout == "fused":
        assert (
            command == f"megasft export '{folder}' '{folder}-per-expert' && {served}-per-expert' --max-lora-rank {rank}"
        )
    else:
        assert command == f"{served}' --max-lora-rank {rank}"
