"""The demo's tokenizer, template, base model and pretraining, and the tool that checks an adapter with peft."""

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

from examples.crafter import play, traces
from megasft.data.tokenizer import load_tokenizer
from megasft.evaluation.tool_calls import find_format


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_model = load_tool("demo_model")  # which make_demo imports from its own folder
make_demo = load_tool("make_demo")
check_adapter = load_tool("check_adapter")

SETTINGS = make_demo.Settings(vocabulary=900, hidden=32, layers=2, heads=2, key_value_heads=2, head_dim=16, experts=4)


@pytest.fixture(scope="module")
def records():
    return [one for policy in ("expert", "aimless") for one in traces.record(3, policy)[0]]


@pytest.fixture(scope="module")
def model_folder(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_demo.make_tokenizer(folder, records, SETTINGS)
    demo_model.make_model(tokenizer, SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return make_demo.AutoTokenizer.from_pretrained(model_folder)


def test_no_two_parts_share_a_game_and_none_is_of_the_worlds_to_be_tested_in():
    for seed in (0, 49):
        parts = make_demo.Settings(seed=seed, games=1000).seeds()
        assert set(parts) == {"train", "validation", "held_out", "aimless"}
        seeds = [game for part in parts.values() for game in part]
        assert len(seeds) == len(set(seeds)) > 1000
        assert max(seeds) < play.HELD_OUT


def test_the_tokenizer_round_trips_text_and_agrees_with_sentencepiece(records, tokenizer, model_folder):
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
    for text in [*map(make_demo.spoken, records), *odd]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == own.encode(text)


def test_a_list_of_actions_begins_and_ends_with_tokens_of_its_own(records, tokenizer):
    """Else `["do"` is another token than `"do"`, and a model may write one for the other."""
    for record in records:
        for message in record["messages"][2::2]:
            tokens = [
                tokenizer.decode([one]) for one in tokenizer.encode(json.dumps(message["tool_calls"][0]["function"]))
            ]
            assert len([one for one in tokens if "[" in one]) == len([one for one in tokens if "]" in one]) == 1
            (begin,), (end,) = ([one for one in tokens if bracket in one] for bracket in "[]")
            assert begin.endswith("[")
            assert end.startswith("]")


def test_frequent_facts_and_the_tags_of_calls_are_one_token(tokenizer):
    for text in ("<tool_call>", "</tool_response>", "health-9", " energy-9", ' "move_left",'):
        assert len(tokenizer.encode(text)) == 1, text
    call = "<tool_call>\n{}\n</tool_call>"
    assert tokenizer.decode(tokenizer.encode(call), skip_special_tokens=True) == call


def test_tokens_begin_as_the_sum_of_their_words(tokenizer):
    embedding = demo_model.make_model(tokenizer, SETTINGS).get_input_embeddings().weight.detach()
    place = {token: embedding[index] for token, index in tokenizer.get_vocab().items()}
    alike = torch.cosine_similarity
    near = alike(place["health-9"], place["\u2581food-9"], dim=0)
    assert near > 0.3 > alike(place["health-9"], place["<tool_call>"], dim=0).abs()
    assert alike(place["\u2581food-9"], place["\u2581food-8"], dim=0) > 0.3, "the same word, another number"
    assert alike(place["do"], place['\u2581"do",'], dim=0) < 0.9, "with quotes it is another token"


def test_pretraining_sees_the_answers_only_and_learns(records, tokenizer):
    encoded = make_demo.encode(tokenizer, records)
    assert len(encoded) == len(records)
    for record, (ids, answer) in zip(records, encoded, strict=True):
        sample = check_adapter.read_sample(tokenizer, json.dumps(record))
        assert ids == sample.ids
        assert answer == sample.supervised, "as the independent check finds them"
    settings = dataclasses.replace(SETTINGS, pretrain_steps=16, pretrain_sequences=4)
    model = demo_model.make_model(tokenizer, settings)
    first = demo_model.pretrain(model, encoded, dataclasses.replace(settings, pretrain_steps=1))
    assert demo_model.pretrain(model, encoded, settings) < 0.9 * first


def test_every_batch_has_work_for_each_process():
    samples = [([0] * (k + 1), [True]) for k in range(17)]
    stream = demo_model.endless(samples, 16, torch.Generator().manual_seed(0))
    assert sorted(len(next(stream)) for _ in range(2)) == [8, 9]


def test_processes_that_share_a_step_train_what_one_trains(records, tokenizer, monkeypatch):
    """Each has the same two conversations, so that the mean over the processes is the mean over the step.

    With AdamW for all weights: Muon orthogonalises in bf16, where a gradient's last bit becomes 1e-4 of a weight.
    """
    monkeypatch.setattr(demo_model, "make_optimizers", lambda model, *_: [torch.optim.AdamW(model.parameters(), 4e-3)])
    pair = make_demo.encode(tokenizer, records[:2])
    trained = []
    for processes in (1, 2):
        settings = dataclasses.replace(
            SETTINGS, pretrain_steps=3, pretrain_sequences=2 * processes, pretrain_processes=processes
        )
        model = demo_model.make_model(tokenizer, settings)
        before = [p.clone() for p in model.parameters()]
        demo_model.pretrain(model, [one for one in pair for _ in range(processes)], settings)
        assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        trained.append(model.state_dict())
    for name, one in trained[0].items():
        # Products of other shapes round differently; AdamW moves a weight by up to the learning rate 4e-3 a step.
        torch.testing.assert_close(trained[1][name], one, rtol=0, atol=1e-5)


def test_each_weight_is_of_one_optimizer_and_pretraining_moves_all_experts(records, tokenizer):
    settings = dataclasses.replace(SETTINGS, pretrain_steps=2, pretrain_sequences=4)
    model = demo_model.make_model(tokenizer, settings)
    fused = [p for p in model.parameters() if p.ndim == 3]
    experts = [torch.nn.Parameter(one) for p in fused for one in p.data]
    muon, adam = demo_model.make_optimizers(model, experts, settings)
    own = [p for one in (muon, adam) for group in one.param_groups for p in group["params"]]
    expected = [p.data_ptr() for p in model.parameters() if p.ndim < 3] + [one.data_ptr() for p in fused for one in p]
    assert sorted(p.data_ptr() for p in own) == sorted(expected)
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    of_adam = {names[p.data_ptr()].split(".")[-2] for p in adam.param_groups[0]["params"]}
    assert {"embed_tokens", "lm_head", "gate", "norm"} <= of_adam
    assert not {"q_proj", "o_proj", "experts"} & of_adam
    before = {name: p.clone() for name, p in model.named_parameters()}
    demo_model.pretrain(model, make_demo.encode(tokenizer, records), settings)
    for name, p in model.named_parameters():
        for old, new in zip(before[name], p, strict=True) if p.ndim == 3 else [(before[name], p)]:
            assert not torch.equal(old, new), name


def test_special_tokens_are_single_and_end_and_padding_are_set(tokenizer):
    for token in make_demo.SPECIAL_TOKENS:
        assert tokenizer.encode(f"a{token}b").count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_template_writes_tools_calls_and_results_as_qwen3_does(tokenizer, records):
    record = records[0]
    text = tokenizer.apply_chat_template(record["messages"], tools=record["tools"], tokenize=False)
    system, user, assistant, result = text.split("<|im_end|>\n")[:4]
    assert system.endswith(f"\n<tools>\n{json.dumps(record['tools'][0])}\n</tools>")
    assert user == "<|im_start|>user\n" + record["messages"][1]["content"]
    said = record["messages"][2]
    call = json.dumps(said["tool_calls"][0]["function"])
    assert assistant == f"<|im_start|>assistant\n{said['content']}\n<tool_call>\n{call}\n</tool_call>"
    assert result == f"<|im_start|>user\n<tool_response>\n{record['messages'][3]['content']}\n</tool_response>"


def test_calls_are_read_as_qwen3s_and_tools_need_no_system_message(tokenizer, records, model_folder):
    assert find_format(load_tokenizer(model_folder)) == "hermes"
    messages, tools = records[0]["messages"][1:2], records[0]["tools"]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    shown = f"<|im_start|>system\n<tools>\n{json.dumps(tools[0])}\n</tools><|im_end|>\n"
    assert text == f"{shown}<|im_start|>user\n{messages[0]['content']}<|im_end|>\n"


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_check_supervises_the_answers_and_their_ends_only(records, tokenizer):
    for record in records:
        sample = check_adapter.read_sample(tokenizer, json.dumps(record))
        supervised = [i for i, chosen in zip(sample.ids, sample.supervised, strict=True) if chosen]
        answers = [
            f"{said['content']}\n<tool_call>\n{json.dumps(said['tool_calls'][0]['function'])}\n</tool_call><|im_end|>"
            for said in record["messages"]
            if said["role"] == "assistant"
        ]
        assert tokenizer.decode(supervised) == "".join(answers)


def test_a_folder_that_the_tool_did_not_make_is_left_unchanged(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(typer.Exit) as end:
        make_demo.main(out=tmp_path, seed=0, games=1, pretrain_steps=0)
    assert end.value.exit_code == 2
    assert "was not made by this tool" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def write_adapter(folder, model_folder, targets):
    """A random adapter of rank 4 in the per-expert layout."""
    model = demo_model.Qwen3MoeForCausalLM.from_pretrained(model_folder)
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
def check(model_folder, records, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in records[:8]))

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
