"""Conversations in the formats that people have become `messages`, and nothing that they say is lost on the way."""

import gzip
import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from megasft.data.conversations import Conversation, Problem, read_conversations
from megasft.data.formats import Changes, recognize, to_messages
from megasft.data.records import read_records
from megasft.data.template import encode_many


def system(text):
    return {"role": "system", "content": text}


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, *calls, **keys):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **keys}


def tool(text, **keys):
    return {"role": "tool", "content": text, **keys}


def call(name, arguments, **keys):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def turns(*pairs):
    return {"conversations": [{"from": who, "value": what} for who, what in pairs]}


F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HERMES = f"You can call functions.\n<tools> </tools> hold them:\n<tools>\n[{json.dumps(F)}]\n</tools>\nAnswer in JSON."
PART = {"text": "part"}
USE = {"toolUse": {"toolUseId": "1", "name": "f", "input": {"é": [1]}}}
RESULT = {"toolResult": {"toolUseId": "1", "content": [{"text": "r"}, {"json": {"é": 1}}], "status": "success"}}

RIGHT = {
    "sharegpt": (
        turns(("system", "Be brief."), ("human", "hi"), ("gpt", "grüß dich")) | {"id": "x1"},
        {"messages": [system("Be brief."), user("hi"), assistant("grüß dich")], "id": "x1"},
    ),
    "sharegpt, roles in other words and keys": (
        {"conversation": [{"role": "User", "content": "a"}, {"role": "ChatGPT", "value": "b", "weight": 0}]},
        {"messages": [user("a"), assistant("b", weight=0)]},
    ),
    "sharegpt, empty system": (
        turns(("system", ""), ("human", "a"), ("gpt", "b")),
        {"messages": [user("a"), assistant("b")]},
    ),
    "sharegpt, system beside it": (
        turns(("human", "a"), ("gpt", "b")) | {"system": "s"},
        {"messages": [system("s"), user("a"), assistant("b")]},
    ),
    "sharegpt, null fields": (
        {"conversations": [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b", "content": None}], "tools": None},
        {"messages": [user("a", weight=None), assistant("b")], "tools": None},
    ),
    "sharegpt, parallel calls and observations": (
        turns(
            ("human", "a"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {"é": 1}}'), ("function_call", '[{"name": "g", "arguments": "{}"}]'),
            ("observation", "1"), ("tool", "2"), ("gpt", "b"),
        ),
        {"messages": [user("a"), assistant("I look.", call("f", {"é": 1}), call("g", "{}")), tool("1"), tool("2"), assistant("b")]},
    ),
    "sharegpt, call with another flag than the text before it": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False}, {"from": "function_call", "value": '{"name": "f"}'}]},
        {"messages": [user("a"), assistant("b", loss=False), assistant("", call("f", None))]},
    ),
    "sharegpt, as JSON text": (
        {"conversations": json.dumps(turns(("human", "a"), ("gpt", "é"))["conversations"])},
        {"messages": [user("a"), assistant("é")]},
    ),
    "sharegpt, as an object of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        {"messages": [user("a"), assistant("b")]},
    ),
    "hermes": (
        turns(
            ("system", HERMES), ("human", "a"), ("gpt", "I look.\n<tool_call>\n{'name': 'f', 'arguments': {'x': True}}\n</tool_call>\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"),
            ("tool", "<tool_response>\n{\"r\": 1}\n</tool_response>\n<tool_response>\n 2\n</tool_response>"), ("gpt", "b"),
        ),
        {
            "messages": [
                system("You can call functions.\n<tools> </tools> hold them:\nAnswer in JSON."), user("a"), assistant("I look.", call("f", {"x": True}), call("f", {})),
                tool('{"r": 1}'), tool(" 2"), assistant("b"),
            ],
            "tools": [F],
        },
    ),
    "hermes, tools in a column too": (
        turns(("system", f"<tools>{json.dumps(F)}</tools>"), ("human", "a"), ("gpt", "b")) | {"tools": json.dumps([F])},
        {"messages": [user("a"), assistant("b")], "tools": json.dumps([F])},
    ),
    "hermes, results in a user turn": (
        turns(("system", HERMES), ("human", "a"), ("gpt", '<tool_call>{"name": "f"}</tool_call>'), ("human", "<tool_response>r</tool_response>"), ("gpt", "b")),
        {"messages": [system("You can call functions.\n<tools> </tools> hold them:\nAnswer in JSON."), user("a"), assistant("", call("f", None)), tool("r"), assistant("b")], "tools": [F]},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"messages": [user("Add.\n1, 2"), assistant("3")]},
    ),
    "alpaca, missing input": ({"instruction": "a", "output": "b"}, {"messages": [user("a"), assistant("b")]}),
    "alpaca, empty and null fields": (
        {"instruction": "a", "input": "", "output": "b", "system": "", "history": None},
        {"messages": [user("a"), assistant("b")]},
    ),
    "alpaca, history and system": (
        {"instruction": "c", "input": None, "output": "d", "system": "s", "history": [["a", "b"]]},
        {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    "dolly": (
        {"instruction": "Who?", "context": "It was Ana.", "response": "Ana", "category": "qa"},
        {"messages": [user("Who?\nIt was Ana."), assistant("Ana")], "category": "qa"},
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, {"messages": [user("a"), assistant("b")]}),
    "prompt and response": ({"prompt": "a", "response": "b"}, {"messages": [user("a"), assistant("b")]}),
    "question and answer": ({"question": "a", "answer": "b"}, {"messages": [user("a"), assistant("b")]}),
    "input and output": ({"input": "a", "output": "b"}, {"messages": [user("a"), assistant("b")]}),
    "question and response with a system prompt": (
        {"id": "7", "system_prompt": "s", "question": "a", "response": "b"},
        {"messages": [system("s"), user("a"), assistant("b")], "id": "7"},
    ),
    "pair with reasoning": (
        {"question": "a", "reasoning": "hm", "answer": "b"},
        {"messages": [user("a"), assistant("b", reasoning="hm")]},
    ),
    "prompt and completion as messages": (
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "tools": [F]},
        {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("d")], "tools": [F]},
    ),
    "prompt as messages, completion as text": (
        {"prompt": [system("s"), user("a")], "completion": "b"},
        {"messages": [system("s"), user("a"), assistant("b")]},
    ),
    "openai": (
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], "parallel_tool_calls": False},
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], "parallel_tool_calls": False},
    ),
    "openai, functions": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}], "functions": [F["function"]]},
        {"messages": [user("a"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}], "functions": [F["function"]]},
    ),
    "messages as JSON text": ({"messages": json.dumps([user("a"), assistant("é")])}, {"messages": [user("a"), assistant("é")]}),
    "messages as a list of JSON texts": (
        {"messages": [json.dumps(user("a")), json.dumps(assistant("é"))]},
        {"messages": [user("a"), assistant("é")]},
    ),
    "messages as an object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {"messages": [user("a"), assistant("b")]},
    ),
    "bedrock, text": (
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "s"}], "messages": [user([PART]), assistant([{"text": "b"}])]},
        {"system": [{"text": "s"}], "messages": [user([PART]), assistant([{"text": "b"}])]},
    ),
    "bedrock, tools": (
        {
            "messages": [
                user([PART]),
                assistant([{"reasoningContent": {"reasoningText": {"text": "hm", "signature": "x"}}}, {"text": "I look."}, USE, {"toolUse": {"toolUseId": "2", "name": "g", "input": {}, "note": "n"}}]),
                user([RESULT, {"toolResult": {"toolUseId": "2", "content": [{"text": "r2"}], "status": "error"}}, {"text": "and?"}]), assistant([{"text": "b"}]),
            ],
            "toolConfig": {"tools": [{"toolSpec": {"name": "f", "description": "é", "inputSchema": {"json": {"type": "object"}}}}], "toolChoice": {"auto": {}}},
        },
        {
            "messages": [
                user([PART]),
                assistant([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I look."}], call("f", {"é": [1]}, id="1"), call("g", {}, id="2"), note="n"),
                tool([{"type": "text", "text": "r"}, {"type": "text", "text": '{"é": 1}'}], tool_call_id="1", status="success"), tool("r2", tool_call_id="2", status="error"),
                user("and?"), assistant([{"text": "b"}]),
            ],
            "tools": [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}],
            "tool_choice": {"auto": {}},
        },
    ),
    "anthropic": (
        {
            "system": "s",
            "messages": [
                user("a"), assistant([{"type": "text", "text": "I look."}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]),
                user([{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}]), assistant("b"),
            ],
        },
        {"system": "s", "messages": [user("a"), assistant("I look.", call("f", {"x": 1}, id="1")), tool("r", tool_call_id="1", is_error=True), assistant("b")]},
    ),
    "trace": (
        {"dialogue": [user("a"), assistant("b", call("f", '{"é": 1}')), tool("r")], "assistant": {"content": "", "tool_calls": [call("g", {})]}, "tools": [F], "score": 1.0},
        {"messages": [user("a"), assistant("b", call("f", '{"é": 1}'), loss=False), tool("r"), assistant("", call("g", {}))], "tools": [F], "score": 1.0},
    ),
}  # fmt: skip


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


# --- files -----------------------------------------------------------------------------------------------------------

PAIRS = [{"question": f'é{i} {{["]}}\\', "answer": f"b{i}"} for i in range(700)]


def compress(text, suffix):
    return gzip.compress(text) if suffix == ".gz" else bytes(pyarrow.compress(text, codec="zstd")) if suffix else text


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "text", "first_lines"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, PAIRS)), [1, 2, 3]),
        ("a.jsonl", json.dumps(PAIRS, indent=2), [2, 6, 10]),
        ("a.jsonl", "\n".join(json.dumps(one, indent=1) for one in PAIRS), [1, 5, 9]),
        ("a.jsonl", "\ufeff\n" + json.dumps(PAIRS, ensure_ascii=False), [2, 2, 2]),
        ("a.json", json.dumps(PAIRS), [1, 1, 1]),
        ("a.json", "[\n" + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n", [2, 3, 4]),
        ("a.json", "\n".join(map(json.dumps, PAIRS)), [1, 2, 3]),
    ],
)
def test_every_layout_of_json_gives_the_same_records_with_their_lines(
    tmp_path, monkeypatch, name, text, first_lines, suffix
):
    monkeypatch.setattr("megasft.data.json_text.CHUNK_BYTES", 1000)
    file = tmp_path / (name + suffix)
    file.write_bytes(compress(text.encode(), suffix))
    found = list(read_records(file))
    assert [record["messages"] for _, record, _ in found] == [
        [user(one["question"]), assistant(one["answer"])] for one in PAIRS
    ]
    assert [line for line, _, _ in found[:3]] == first_lines


def test_what_is_wrong_in_an_array_is_reported_where_it_stands(tmp_path):
    pair = '{"question": "a", "answer": "b"}'
    (tmp_path / "a.json").write_text(
        f'[\n{pair},\n{{"question"\n: x}},\n3,\n{pair} {pair},\n{pair},\n{{"question": "cut'
    )
    found = list(read_records(tmp_path / "a.json"))
    assert [(line, record if isinstance(record, str) else "") for line, record, _ in found] == [
        (2, ""),
        (3, "not JSON (Expecting value, line 2 of the record, column 3)"),
        (5, "not an object"),
        (6, "not JSON (Extra data, column 34)"),
        (7, ""),
        (8, "the array has no end: the file is damaged or cut short"),
    ]
    (tmp_path / "b.json").write_text(f"[{pair}]\n\n[{pair}]")
    assert [(line, type(record)) for line, record, _ in read_records(tmp_path / "b.json")] == [(1, dict), (3, str)]


def test_a_record_of_an_array_that_is_too_long_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("megasft.data.json_text.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("megasft.data.json_text.CHUNK_BYTES", 500)
    pair = {"question": "a", "answer": "b"}
    (tmp_path / "a.json").write_text(json.dumps([pair, pair | {"answer": "x" * 5000}, pair], indent=1))
    good, bad = read_records(tmp_path / "a.json")
    assert isinstance(good[1], dict)
    assert bad[0] == 6
    assert "longer than" in bad[1]


def test_parquet_files_of_other_formats_are_read_with_all_their_columns(tmp_path):
    rows = [
        {
            "conversations": turns(("human", "a"), ("gpt", f"b{i}"))["conversations"],
            "system": None if i else "s",
            "id": i,
        }
        for i in range(40)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [record for _, record, _ in read_records(tmp_path / "a.parquet")]
    assert found[0] == {"messages": [system("s"), user("a"), assistant("b0")], "id": 0}
    assert found[39] == {"messages": [user("a"), assistant("b39")], "id": 39}


def test_what_lies_beside_the_data_of_a_folder_is_not_read(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "a.json").write_text(json.dumps(PAIRS[:2]))
    assert len(list(read_conversations(tmp_path))) == 2


def test_a_file_trains_the_same_tokens_before_and_after_it_is_rewritten(tmp_path, with_template):
    tokenizer = with_template("thinking")
    for name in (
        "sharegpt",
        "sharegpt, parallel calls and observations",
        "alpaca, history and system",
        "prompt and completion as messages",
        "messages as JSON text",
        "trace",
    ):
        record, right = RIGHT[name]
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        (tmp_path / "b.jsonl").write_text(json.dumps(right))
        one, other = encode_many(
            [*read_conversations(tmp_path / "a.jsonl"), *read_conversations(tmp_path / "b.jsonl")], tokenizer
        )
        assert one.mask.any()
        assert one.ids.tolist() == other.ids.tolist()
        assert one.mask.tolist() == other.mask.tolist()


# --- fuzz ------------------------------------------------------------------------------------------------------------


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def said(value):
    """The marks that `random_record` put into strings and keys, at any depth, in JSON text too. A null says nothing."""
    return set(re.findall(r"§\d+é", json.dumps(without_nulls(value), ensure_ascii=False)))


def places(value, path=()):
    """The way to every value inside of `value`, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damaged(rng, value, path, word):
    """The same with what lies at `path` exchanged, added to or left out."""
    if path:
        key, *rest = path
        inner = damaged(rng, value[key], rest, word)
        return {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]
    if isinstance(value, dict):
        keys = ("content", "system", "weight", "status", "text", "json", "tools", f"x{word()}", *value)
        return rng.choice(
            [
                {**value, rng.choice(keys): rng.choice([word(), None, 1, [word()]])},
                dict(list(value.items())[1:]),
                [value],
            ]
        )
    if isinstance(value, list):
        return rng.choice([[*value, word()], [*value, *value[:1]], value[1:], value[::-1], {"a": value}])
    if isinstance(value, str):
        return rng.choice(
            [
                word(),
                value + word(),
                word() + value,
                value + f" {value}",
                value + "\n" + word(),
                None,
                [value],
                {"text": value},
            ]
        )
    return rng.choice([word(), None, 7, "", [], {}])


def random_record(rng):
    """A record of any format, and sometimes not quite, in which every text is one of its own."""
    count = iter(range(10**6))

    def word():
        return f"§{next(count)}é"

    def marked(value):
        """With a mark in each text that is content, and not a name that the format gives a meaning."""
        if isinstance(value, dict):
            return {
                key: item if key in ("role", "from", "type", "schemaVersion", "status") else marked(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [marked(item) for item in value]
        if not isinstance(value, str) or not value:
            return value
        if value[0] in "[{":
            try:
                return json.dumps(marked(json.loads(value)), ensure_ascii=False)
            except ValueError:
                return value
        return re.sub(
            r"(</?tool_\w+>|<tools>.*?</tools>|\{[^{}]*(?:\{[^{}]*\})?[^{}]*\})|(\w+)",
            lambda found: found[1] or found[2] + word(),
            value,
            flags=re.DOTALL,
        )

    name = rng.choice(list(RIGHT))
    record = marked(RIGHT[name][0])
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        record = damaged(rng, record, rng.choice(list(places(record))), word)
    return name, record if isinstance(record, dict) else {}


def test_no_text_of_ten_thousand_records_is_lost():
    rng = random.Random(0)
    read = dict.fromkeys(RIGHT, 0)
    for _ in range(10_000):
        name, record = random_record(rng)
        made = to_messages(record, recognize(record) or "messages", Changes())
        if isinstance(made, str):
            assert made, "a record is refused without a reason"
        else:
            read[name] += bool(said(record))
            assert said(record) <= said(made), f"lost {said(record) - said(made)} of {record}"
    assert min(read.values()) > 15, read
