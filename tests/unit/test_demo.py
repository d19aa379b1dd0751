"""The demo's data and tokenizer, and the tool that checks an adapter with peft."""

import ast
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import typer
from safetensors.torch import save_file


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_demo = load_tool("make_demo")
check_adapter = load_tool("check_adapter")

SETTINGS = make_demo.Settings(vocabulary=700, hidden=32, layers=2, heads=2, key_value_heads=2, head_dim=16, experts=4)
MODULES = ("argparse", "calendar", "difflib", "fractions", "heapq", "ipaddress", "pathlib", "shutil", "statistics")


@pytest.fixture(scope="module")
def library():
    modules = make_demo.standard_library()
    return {name: modules[name] for name in MODULES}


@pytest.fixture(scope="module")
def conversations(library):
    return make_demo.build_conversations(library, {}, SETTINGS)[0]


@pytest.fixture(scope="module")
def model_folder(conversations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_demo.make_tokenizer(folder, conversations, SETTINGS)
    make_demo.make_model(tokenizer, SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return make_demo.AutoTokenizer.from_pretrained(model_folder)


def bodies(conversation):
    return re.findall(r"\n```python\n(.*)\n```$", conversation[-1]["content"], flags=re.DOTALL)


def test_the_same_modules_give_the_same_conversations(library, conversations):
    assert make_demo.build_conversations(library, {}, SETTINGS)[0] == conversations
    other = make_demo.build_conversations(library, {}, dataclasses.replace(SETTINGS, seed=1))[0]
    assert len(other) == len(conversations)
    assert other != conversations


def test_every_kind_of_conversation_occurs_and_ends_with_an_answer(conversations):
    shapes = {tuple(message["role"] for message in c) for c in conversations}
    turn = ("user", "assistant")
    assert shapes == {turn, turn * 2, ("system", *turn), ("system", *turn * 2)}


def test_question_and_answer_make_a_function_that_parses(conversations):
    answered = 0
    for conversation in conversations:
        header = re.search(r"^(async )?def .*\"\"\"", conversation[-2]["content"], flags=re.DOTALL | re.MULTILINE)
        (body,) = bodies(conversation)
        if header:  # a follow-up question has none, and some docstrings use other quotes
            assert isinstance(ast.parse(f"{header[0]}\n{body}").body[0], ast.FunctionDef | ast.AsyncFunctionDef)
            answered += 1
    assert answered > len(conversations) / 2


def test_a_module_is_on_one_side_and_a_copied_function_stays_with_the_training_side(library):
    train, validation = make_demo.split_modules(make_demo.standard_library(), SETTINGS)
    assert not train.keys() & validation.keys()
    assert 0.02 < len(validation) / len(train) < 0.1

    new = 'def fresh(x):\n    """Return x."""\n    return [x, "nowhere else"]\n'
    copied = {"copy_of_heapq": library["heapq"] + new}
    first, second = make_demo.build_conversations({"heapq": library["heapq"]}, copied, SETTINGS)
    assert len(first) > 5
    assert [bodies(c) for c in second] == [['    return [x, "nowhere else"]']]


def test_the_tokenizer_round_trips_text_and_agrees_with_sentencepiece(library, tokenizer, model_folder):
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))
    odd = [
        "  leading",
        "\n\n\tx = 1  \n",
        "a  b   c\r\n",
        "naïve → 😀\x00\x0c",
        "",
        " ",
        "<|im_start|>user\n  hi<|im_end|>\n",
    ]
    for text in [*library.values(), *odd]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == own.encode(text)


def test_special_tokens_are_single_and_end_and_padding_are_set(tokenizer):
    for token in make_demo.SPECIAL_TOKENS:
        assert tokenizer.encode(f"a{token}b").count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_check_supervises_the_answers_and_their_ends_only(conversations, tokenizer):
    for conversation in conversations:
        sample = check_adapter.read_sample(tokenizer, json.dumps({"messages": conversation}))
        supervised = [i for i, chosen in zip(sample.ids, sample.supervised, strict=True) if chosen]
        answers = [message["content"] + "<|im_end|>" for message in conversation if message["role"] == "assistant"]
        assert tokenizer.decode(supervised) == "".join(answers)


def test_a_folder_that_the_tool_did_not_make_is_left_unchanged(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(typer.Exit) as end:
        make_demo.main(out=tmp_path, seed=0, pretrain_steps=0)
    assert end.value.exit_code == 2
    assert "was not made by this tool" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def write_adapter(folder, model_folder, targets):
    """A random adapter of rank 4 in the per-expert layout."""
    model = make_demo.Qwen3MoeForCausalLM.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    hidden, wide = SETTINGS.hidden, SETTINGS.heads * SETTINGS.head_dim
    shapes = {"self_attn.q_proj": (wide, hidden), "mlp.gate": (SETTINGS.experts, hidden)}
    for expert in range(SETTINGS.experts):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            shape = (SETTINGS.expert_intermediate, hidden)
            shapes[f"mlp.experts.{expert}.{kind}"] = shape[::-1] if kind == "down_proj" else shape
    tensors = {}
    for layer in range(SETTINGS.layers):
        for name, (rows, columns) in shapes.items():
            if name.rpartition(".")[2] in targets:
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(targets)}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return model


@pytest.fixture
def check(model_folder, conversations, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations[:8]))

    def run(adapter, expect=None):
        check_adapter.main(model_folder, adapter, data, expect, None, tolerance=0.01, sequence_length=512, base=True)

    return run


ALL = {"q_proj", "gate", "gate_proj", "up_proj", "down_proj"}


def test_the_check_compares_with_the_expected_loss(check, model_folder, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", model_folder, ALL)
    check(tmp_path / "adapter")
    printed = capsys.readouterr().out
    assert f"{SETTINGS.layers * 2 * (2 + 3 * SETTINGS.experts)} tensors, all loaded" in printed
    loss = float(re.search(r"adapter loss\s+([\d.]+)", printed)[1])
    check(tmp_path / "adapter", expect=loss * 1.005)
    capsys.readouterr()
    with pytest.raises(typer.Exit) as end:
        check(tmp_path / "adapter", expect=loss * 1.02)
    assert end.value.exit_code == 1
    assert f"{loss * 1.02:.4f}" in capsys.readouterr().out, "what was expected is named"


def test_the_check_fails_if_peft_silently_ignores_tensors(check, model_folder, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", model_folder, {"gate_proj", "up_proj"})
    with pytest.raises(typer.Exit) as end:
        check(tmp_path / "adapter")
    assert end.value.exit_code == 1
    assert re.search(r"not loaded: .*\.mlp\.experts\.", capsys.readouterr().err, re.MULTILINE)
