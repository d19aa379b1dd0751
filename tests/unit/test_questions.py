"""Every supervised turn is asked with its true history, and its reference is read through the template's own format."""

import json

import pytest

from megasft.config.schema import RunConfig
from megasft.data.account import Place
from megasft.evaluation.held_out import read_held_out
from megasft.evaluation.questions import ask, choose
from megasft.evaluation.request import find_data, read_count
from megasft.evaluation.score import score
from megasft.evaluation.tool_calls import Call, read_reply
from megasft.generation.prompts import encode
from megasft.messages import UserError

SCHEMA = {"type": "object", "properties": {
    "text": {"type": "string"}, "count": {"type": "integer"}, "on": {"type": "boolean"}, "nested": {"type": "object"},
}}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("find", "keep")]
CALLS = [
    ("find", {"text": "1", "count": 1, "on": True, "nested": {"a": [1, None, {"b": "naïve"}]}}),
    ("keep", {"text": "two\nlines  and </tool> <x>"}),
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Find it."},
    {"role": "assistant", "content": "Yes.", "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in CALLS]},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "Skip this one.", "loss": False},
    {"role": "user", "content": "And <|im_end|>?"},
    {"role": "assistant", "content": "Done."},
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(*conversations):
        path = tmp_path / "held_out.jsonl"
        path.write_text("".join(json.dumps({"messages": one, "tools": TOOLS}) + "\n" for one in conversations))
        return path

    return write


def asked(path, tokenizer, count=None, context=4096, **data):
    config = RunConfig.from_dict({"job": {"model": "m"}, "data": data})
    held_out = read_held_out(path, tokenizer, config)
    return ask(held_out.files, held_out.conversations, count, tokenizer, config, context)


@pytest.mark.parametrize("template", ["thinking", "xml_calls"])
def test_a_question_is_what_a_server_is_asked_and_its_reference_what_it_would_read(with_template, file, template):
    tokenizer = with_template(template)
    found = asked(file(MESSAGES), tokenizer)
    assert [question.turn for question in found.asked] == [0, 2]
    for question, at in zip(found.asked, (2, 6), strict=True):
        assert question.prompt == encode(tokenizer, MESSAGES[:at], TOOLS, {})
        assert question.reference == read_reply(question.text, found.format, TOOLS)
        assert all(share.right == share.all for name, share in score(question.reference, question.reference).items()
                   if name not in ("cut_off", "unasked_call"))  # fmt: skip
    first, last = (question.reference for question in found.asked)
    assert (first.text, first.calls) == ("Yes.", tuple(Call(name, arguments) for name, arguments in CALLS))
    assert (last.text, last.calls) == ("Done.", ())


@pytest.mark.parametrize(("template", "tag"), [("thinking", "</tool_call>"), ("xml_calls", "</parameter></function")])
def test_a_reference_that_no_server_could_read_is_taken_from_the_record(with_template, file, template, tag):
    call = {"type": "function", "function": {"name": "find", "arguments": {"text": f"a {tag} b", "count": 1}}}
    messages = [*MESSAGES[:2], {"role": "assistant", "content": "", "tool_calls": [call]}]
    [question] = asked(file(messages), with_template(template)).asked
    [found] = question.reference.calls
    assert found.name == "find"
    if template == "thinking":
        assert found.arguments == call["function"]["arguments"]


def test_calls_in_the_text_of_a_record_are_read_too(with_template, file):
    said = 'So: <tool_call>{"name": "find", "arguments": {"count": 2}}</tool_call>'
    [question] = asked(file([*MESSAGES[:2], {"role": "assistant", "content": said}]), with_template("thinking")).asked
    assert question.reference.calls == (Call("find", {"count": 2}),)
    assert question.reference.text == "So:"


def test_train_on_and_the_number_of_conversations_choose_the_turns(with_template, file, capsys):
    tokenizer = with_template("thinking")
    path = file(*[MESSAGES] * 5)
    found = asked(path, tokenizer, count=3, train_on="last")
    assert (found.chosen, [question.turn for question in found.asked]) == ([0, 2, 4], [2, 2, 2])
    assert [question.conversation for question in asked(path, tokenizer, count=2).asked] == [0, 0, 4, 4]
    assert choose(1, 9) == [0]
    assert choose(9, 3) == choose(None, 3) == [0, 1, 2]


def test_turns_that_cannot_be_answered_are_said(with_template, file, capsys):
    tokenizer = with_template("thinking")
    first, last = (len(question.prompt) for question in asked(file(MESSAGES), tokenizer).asked)
    found = asked(file(MESSAGES), tokenizer, context=last)
    assert [question.turn for question in found.asked] == [0]
    assert "turns that are not answered: 1 (" in (said := capsys.readouterr().err)
    assert f":1, turn 3: the prompt has {last} tokens" in said
    with pytest.raises(UserError, match=r"nothing to answer: .*held_out\.jsonl:1, turn 1"):
        asked(file(MESSAGES), tokenizer, context=first)


def test_a_template_whose_calls_cannot_be_read_is_said(with_template, file, capsys):
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = asked(file(MESSAGES), with_template(template))
    assert found.format is None
    assert found.asked[0].reference.text.startswith("Yes.[find(")
    assert "tool calls neither as Qwen3 nor as Qwen3-Coder" in capsys.readouterr().err


def test_places_are_those_of_the_records_whatever_becomes_of_them(with_template, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"messages": [turn for _ in range(20) for turn in short["messages"]]}
    for name, records in {"a": [short, {"messages": 3}, long], "b": [long, short]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"data": {"on_error": "skip", "overlong": "split_turns"}, "hyperparameters": {"sequence_length": 60}}
    held_out = read_held_out(folder, with_template("chatml"), RunConfig.from_dict(settings))
    assert held_out.conversations == [Place(0, 1), Place(0, 3), Place(1, 1), Place(1, 2)]
    assert sorted(set(held_out.of.tolist())) == [0, 1, 2, 3]
    assert len(held_out.of) == len(held_out.samples) > 4
    turns = held_out.parts[held_out.samples.mask.numpy()] // 2
    assert sorted(set(turns.tolist())) == list(range(20)), "a later sample of a conversation has its later turns"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "some", "", "٣"])
def test_a_number_of_conversations_is_above_0_or_all(text):
    with pytest.raises(UserError, match=r"--generate .*1 or more, or all"):
        read_count(text)
    assert (read_count(None), read_count("7"), read_count("all")) == (0, 7, "all")


def test_without_data_that_of_the_run_is_used(tmp_path):
    config = RunConfig.from_dict({"data": {"validation_path": "v.jsonl"}})
    assert find_data("d.jsonl", config, "runs/x") == "d.jsonl"
    assert find_data(None, config, "runs/x") == "v.jsonl"
    for run in (None, RunConfig.from_dict({})):
        with pytest.raises(UserError, match=r"nothing to evaluate on, as .*runs/x .*name DATA"):
            find_data(None, run, "runs/x")
