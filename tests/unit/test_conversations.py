"""Reading and checking conversations: what is accepted, what is reported, and that no damaged line stops the reader."""

import gzip
import json
import random
import time

import pyarrow
import pyarrow.parquet
import pytest

from megasft.data import records
from megasft.data.conversations import Conversation, Problem, Problems, read_conversations
from megasft.messages import UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
REPLY = {"role": "tool", "content": "ok"}


def read(tmp_path, *lines):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return list(read_conversations(file))


def read_messages(tmp_path, *messages, **rest):
    return read(tmp_path, {"messages": list(messages), **rest})[0]


def test_every_kind_of_file_gives_the_same_conversations(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": f"answer {i} ü"}]} for i in range(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(bytes(pyarrow.compress(h, codec="zstd")) for h in halves))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "notes.txt").write_text("not read")
    found = list(read_conversations(tmp_path))
    assert [conversation.line for conversation in found] == [*range(1, 101)] * 4
    assert [conversation.messages for conversation in found] == [row["messages"] for row in rows] * 4
    assert sorted({conversation.file for conversation in found}) == [
        str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    ]


def test_messages_come_out_in_the_form_templates_read(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    nested = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "g"}}]}
    reply = {"role": "tool", "content": "ok", "tool_call_id": "1", "name": "g", "score": 7}
    thought = {"role": "assistant", "content": "done", "reasoning_content": "hm", "weight": 1}
    tools = [{"type": "function", "function": {"name": "g"}}]
    read_one = read_messages(tmp_path, parts, CALL, REPLY, nested, reply, thought, tools=tools, id=3)
    function = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert read_one.messages[0] == {"role": "user", "content": "a\nb"}
    assert read_one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [function]}
    assert read_one.messages[3]["tool_calls"][0] == {
        "type": "function",
        "id": "1",
        "function": {"name": "g", "arguments": {}},
    }
    assert read_one.messages[4] == {"role": "tool", "content": "ok", "tool_call_id": "1", "name": "g"}
    assert read_one.messages[5] == {"role": "assistant", "content": "done", "reasoning_content": "hm"}
    assert read_one.tools == tools
    assert read_one.notes == {"ignored key `id`": 1, "ignored key `messages[].score`": 1}


def test_loss_and_weight_switch_assistant_messages_off(tmp_path):
    off = [{**ANSWER, "loss": False}, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 0.0, "loss": False}]
    on = [ANSWER, {**ANSWER, "loss": True}, {**ANSWER, "weight": 1, "loss": None}]
    found = read_messages(tmp_path, {**USER, "loss": False}, *off, *on)
    assert found.supervised == (False, False, False, False, True, True, True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "missing or empty"),
        (["hi"], "not an object"),
        ([{"content": "x"}, ANSWER], "role"),
        ([{"role": "critic", "content": "x"}, ANSWER], "role is not one of system, developer, user, assistant, tool"),
        ([{"role": "human", "content": "x"}, ANSWER], "write 'human' as 'user'"),
        ([{"role": ["user"], "content": "x"}, ANSWER], "role"),
        ([USER, REPLY, ANSWER], "answers nobody"),
        ([ANSWER, USER], "needs a user message"),
        ([USER, {**ANSWER, "content": " \n"}], "says nothing"),
        ([USER], "nothing to learn"),
        ([USER, {**ANSWER, "loss": False}], "nothing to learn"),
        ([{**USER, "loss": True}, ANSWER], "only assistant messages"),
        ([USER, {**ANSWER, "loss": "yes"}], "`loss` can be 0 or 1"),
        ([USER, {**ANSWER, "weight": 0.5}], "`weight` can be 0 or 1"),
        ([USER, {**ANSWER, "weight": 1, "loss": False}], "contradict"),
        ([{"role": "user", "content": None}, ANSWER], "null beside"),
        ([USER, {"role": "assistant"}], "null beside"),
        ([{"role": "user", "content": 3}, ANSWER], "is not text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER], "only text parts"),
        ([{"role": "user", "content": [3]}, ANSWER], "only text parts"),
        ([{**USER, "content": "a\0b"}, ANSWER], "NUL"),
        ([{**USER, "content": "a\ud800b"}, ANSWER], "surrogate"),
        ([{**USER, "name": 3}, ANSWER], "name is not text"),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], "belongs to an assistant"),
        ([USER, {**ANSWER, "tool_calls": {"name": "f"}}], "is a list"),
        ([USER, {**ANSWER, "tool_calls": ["f"]}], "not a function call"),
        ([USER, {**ANSWER, "tool_calls": [{"type": "function", "function": {}}]}], "no name"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{a"}]}], "not JSON"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}], "given twice"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": 1e999}'}]}], "too large"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}], "surrogate"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}], "not an object"),
        ([USER, {**CALL, "function_call": {"name": "f"}}], "are both there"),
        ([{**USER, "function_call": {"name": "f"}}, ANSWER], "belongs to an assistant"),
    ],
)
def test_a_wrong_message_is_reported(tmp_path, messages, reason):
    problem = read_messages(tmp_path, *messages)
    assert isinstance(problem, Problem)
    assert reason in problem.reason
    assert problem.line == 1


@pytest.mark.parametrize("messages", [{"role": "user", "content": "hi"}, 3, True])
def test_messages_that_are_no_list_are_reported(tmp_path, messages):
    (problem,) = read(tmp_path, {"messages": messages})
    assert problem.reason == "`messages` is not a list"


def test_the_excerpt_is_of_what_is_wrong(tmp_path):
    problem = read_messages(tmp_path, USER, {**ANSWER, "content": "a\0b"})
    assert problem.excerpt == "a\\x00b"


def test_a_tool_reply_may_come_after_other_messages_than_its_call(tmp_path):
    late = read_messages(tmp_path, USER, CALL, USER, REPLY, ANSWER)
    assert not late.notes
    assert read_messages(tmp_path, USER, CALL, REPLY, USER, REPLY, ANSWER).notes == {
        "tool replies that answer no tool call (kept)": 1
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"messages": "\xc3"}', "UTF-8"),
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"messages": [], "messages": []}', "'messages' is given twice"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
        (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested deeper than 64"),
        (b'{"a": ' * 200_000, "nested deeper than 64"),
        (b'{"tools": {}, "messages": [{"role": "user", "content": "a\x00"}]}', "not JSON"),
    ],
)
def test_a_damaged_line_is_reported_and_the_next_one_is_read(tmp_path, line, reason):
    problem, good = read(tmp_path, line, {"messages": [USER, ANSWER]})
    assert isinstance(problem, Problem)
    assert reason in problem.reason
    assert isinstance(good, Conversation)
    assert good.line == 2


def test_problems_name_file_line_and_an_excerpt_that_is_safe_to_print(tmp_path):
    found = read(tmp_path, b"", {"messages": [USER, ANSWER]}, b"  ", b'{"\x1b[31mred' + b"x" * 500)
    assert [one.line for one in found] == [2, 4]
    text = str(found[1])
    assert text.startswith(f"{tmp_path / 'data.jsonl'}:4: not JSON")
    assert "\\x1b[31mred" in text
    assert "\x1b" not in text
    assert len(text) < 300


def test_only_the_first_problems_are_shown_and_the_rest_counted():
    problems = Problems()
    for line in range(50):
        problems.add(Problem("f", line, "bad"))
    assert problems.total == 50
    assert problems.lines()[-1] == "... and 30 more"
    assert len(problems.lines()) == 21


def test_a_line_that_is_too_long_is_reported_and_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    long = {"messages": [{**USER, "content": "x" * 5000}, ANSWER]}
    problem, good = read(tmp_path, long, {"messages": [USER, ANSWER]})
    assert "longer than" in problem.reason
    assert good.line == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_an_empty_or_damaged_file_is_a_problem(tmp_path, name):
    file = tmp_path / name
    for content in (b"", b"\x28\xb5\x2f\xfd rubbish \x00\x01", b"\x1f\x8b\x08\x00rubbish"):
        file.write_bytes(content)
        found = list(read_conversations(file))
        assert len(found) == 1
        assert isinstance(found[0], Problem)


def test_a_cut_gzip_file_gives_what_it_holds_and_then_a_problem(tmp_path):
    text = "".join(json.dumps({"messages": [{**USER, "content": str(i * 7919)}, ANSWER]}) + "\n" for i in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-3000])
    *good, last = read_conversations(tmp_path)
    assert len(good) > 100
    assert all(isinstance(one, Conversation) for one in good)
    assert "cut short" in last.reason


def test_what_is_not_there_is_a_user_error(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"jsonl\.gz"):
            list(read_conversations(path))
    (tmp_path / "data.csv").write_text("{}")
    with pytest.raises(UserError, match="unknown kind"):
        list(read_conversations(tmp_path / "data.csv"))


def test_parquet_without_nulls_and_with_wrong_columns(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1, "b": None}}, {"name": "g", "arguments": {"a": None, "b": "x"}}]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = read_conversations(tmp_path / "a.parquet")
    assert [call["function"]["arguments"] for call in found.messages[1]["tool_calls"]] == [{"a": 1}, {"b": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"words": "x"}]), tmp_path / "b.parquet")
    (problem,) = read_conversations(tmp_path / "b.parquet")
    assert "no column `messages`" in problem.reason


def test_ten_thousand_damaged_lines_are_each_reported_or_accepted(tmp_path):
    """Damage that cannot be right must be reported; random damage must be one or the other, with the line's number."""
    rng = random.Random(0)
    base = {"messages": [{"role": "system", "content": "é"}, USER, CALL, REPLY, ANSWER], "tools": [{"name": "f"}]}
    good = json.dumps(base, ensure_ascii=False).encode()
    values = [None, True, 0, -1.5, "", "x", "\ud800", "\0", [], {}, [[]], {"role": "user"}, 10**30]

    def swapped(value):
        """The record with one value, anywhere in it, exchanged for another."""
        if isinstance(value, dict | list) and value and rng.random() < 0.85:
            key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
            value = value.copy()
            value[key] = swapped(value[key])
            return value
        return rng.choice(values)

    def flipped():
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.choice([b for b in range(256) if b != 10])
        return bytes(line)

    surely_wrong = [
        lambda: good[: rng.randrange(1, len(good))],
        lambda: good.replace(b"hello", rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\\ud800"])),
        lambda: good.replace(b'"hi"', b"[" * (n := rng.randint(65, 3000)) + b"]" * n),
        lambda: good[:-1] + b', "tools": []}',
        lambda: good.replace(b'"role": "user"', b'"role": "user", "role": "user"'),
    ]
    lines, must_report = [], set()
    for number in range(1, 10_001):
        kind = rng.randrange(4)
        if kind == 0:
            lines.append(rng.choice(surely_wrong)())
            must_report.add(number)
        elif kind == 1:
            lines.append(json.dumps(swapped(base)).encode())
        elif kind == 2:
            lines.append(flipped())
        else:
            lines.append(bytes(rng.choices(range(11, 256), k=rng.randint(1, 200))))
    lines[77] = json.dumps({"messages": [{**USER, "content": "x" * 10_000_000}, ANSWER]}).encode()
    must_report.discard(78)
    started = time.process_time()
    found = read(tmp_path, *lines)
    assert time.process_time() - started < 30
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    assert [one.line for one in found] == [number for number in range(1, 10_001) if number not in blank]
    accepted = [one for one in found if isinstance(one, Conversation)]
    assert not must_report & {one.line for one in accepted}
    assert 78 in {one.line for one in accepted}
    assert 200 < len(accepted) < 5000
    for one in accepted:
        assert all(isinstance(message["content"], str) for message in one.messages)
        json.dumps([one.messages, one.tools], ensure_ascii=False, allow_nan=False).encode()
