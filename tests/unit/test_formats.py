"""Conversations in the formats that people have become `messages`, or are refused with a reason."""

import json

import pytest

from megasft.data.conversations import Conversation, Problem, read_conversations
from megasft.data.formats import recognize, to_messages
from tests.unit.records_by_format import HERMES, PART, RESULT, RIGHT, USE, F, assistant, call, system, tool, turns, user


@pytest.mark.parametrize("name", RIGHT)
def test_a_record_of_each_format_becomes_messages(name):
    record, right = RIGHT[name]
    before = json.dumps(record)
    assert to_messages(record, recognize(record)) == right
    assert json.dumps(record) == before, "the reader changed what it was given"


def test_text_calls_in_messages_become_structured_where_hermes_is_asked_for():
    record = {
        "messages": [
            system(HERMES),
            user("a"),
            assistant('<tool_call>{"name": "f"}</tool_call>'),
            tool("r"),
            assistant("b"),
        ]
    }
    assert to_messages(record, "messages") == record
    made = to_messages(record, "hermes")
    assert made["messages"][2] == assistant("", call("f", None))
    assert made["tools"] == [F]


def test_named_columns_are_joined_in_their_order():
    record = {"question": "a?", "context": "c", "answer": "b", "source": "s"}
    assert to_messages(record, "context+question/answer") == {
        "messages": [user("c\na?"), assistant("b")],
        "source": "s",
    }
    assert to_messages(record, "story/answer") == "the column `story` is missing"


def test_earlier_turns_of_a_trace_can_be_trained_on_too():
    record, _ = RIGHT["trace"]
    assert to_messages(record, "traces", train_on="all")["messages"][1] == assistant("b", call("f", '{"é": 1}'))


WRONG = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
    ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "preference data"),
    ({"prompt": "a", "completion": "b", "label": False}, "`label` says which answers are good"),
    ({"messages": [user("a")], "conversations": []}, "both `messages` and `conversations`"),
    (user("a"), "a message, not a conversation"),
    ({"text": "once"}, "plain text without an answer"),
    ({"context": "c", "question": "a", "answer": "b"}, "--format context+question/answer"),
    ({"prompt": "a", "completion": "b", "response": "c"}, "`prompt`, `response`, `completion`"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "several columns"),
    ({"question": "a", "answer": 4}, "`answer` is neither text nor a list of messages"),
    ({"question": "a", "answer": ["b", "c"]}, "`answer` is neither text nor a list of messages"),
    ({"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}, "`history[0]` is not a pair"),
    ({"conversations": "hello"}, "`conversations` is text, and not JSON"),
    ({"conversations": {"from": ["human"], "value": []}}, "lists that differ in length"),
    (turns(("narrator", "a")), "`from` is 'narrator'"),
    ({"conversations": [["human", "a"]]}, "conversations[0] is not an object"),
    ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "has both `value` and `content`"),
    (turns(("human", "a"), ("function_call", "f(1)")), "conversations[1].value is not a call"),
    (turns(("human", "a"), ("function_call", '{"name": "f", "why": "x"}')), "no place for the key `why`"),
    (turns(("system", HERMES), ("human", "a"), ("gpt", "<tool_call>f(1)</tool_call>")), "messages[2]: in <tool_call> is no"),
    (turns(("system", HERMES), ("human", "a"), ("gpt", '<tool_call>{"name": "f"}</tool_call> then b')), "text behind a tool call"),
    (turns(("system", HERMES), ("human", "a"), ("gpt", "b")) | {"tools": "[{}]"}, "differ from those in `tools`"),
    ({"messages": [user("a"), assistant([USE, PART])]}, "messages[1].content[1]: text behind a tool call"),
    ({"messages": [user([{"image": {}}, RESULT])]}, "a part of the kind `image` cannot be read"),
    ({"messages": [user([{"toolResult": {"content": [{"image": {}}]}}])]}, "messages[0].content[0].content[0]: a part of the kind `image`"),
    ({"dialogue": "a", "assistant": {}}, "`dialogue` is not a list"),
    ({"dialogue": [], "assistant": "b"}, "`assistant` is not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), WRONG)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, record, reason):
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps(record))
    (problem,) = read_conversations(tmp_path / "a.jsonl")
    assert isinstance(problem, Problem)
    assert str(problem).startswith(f"{tmp_path / 'a.jsonl'}:3: ")
    assert reason in problem.reason
    assert problem.excerpt


def test_a_record_of_another_format_than_the_first_is_refused(tmp_path, capsys):
    lines = [{"conversations": None}, turns(("human", "a"), ("gpt", "b")), {"question": "a", "answer": "b"}, {"x": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, good, other, unknown = read_conversations(tmp_path / "a.jsonl")
    assert isinstance(good, Conversation)
    assert (
        other.reason == "this looks like pairs of a prompt and its answer; the file began as ShareGPT (`conversations`)"
    )
    assert first.reason == unknown.reason == "`conversations` is missing or null"
    assert capsys.readouterr().err == f"{tmp_path / 'a.jsonl'}: ShareGPT (`conversations`)\n"
