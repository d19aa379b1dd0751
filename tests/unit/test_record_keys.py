"""What each key of a record means, and that none is passed over without a word."""

import json

import pytest

from megasft.data.conversations import Conversation, Problem, check_record, read_conversations
from megasft.data.record_keys import REASONING, TRAINED, UNTRAINED

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def read(*messages, ignore=(), **rest):
    return check_record({"messages": list(messages), **rest}, "data.jsonl", 3, ignore_keys=ignore)


def good(*messages, **rest):
    found = read(*messages, **rest)
    assert isinstance(found, Conversation), found
    return found


def reason(*messages, **rest):
    found = read(*messages, **rest)
    assert isinstance(found, Problem), found
    assert (found.file, found.line) == ("data.jsonl", 3)
    return found.reason


# --- at the top ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "system_instruction"])
@pytest.mark.parametrize(
    "value", ["Be brief.\nSpeak Latin.", [{"text": "Be brief."}, {"type": "text", "text": "Speak Latin."}]]
)
def test_a_system_prompt_becomes_the_first_message(key, value):
    found = good(USER, ANSWER, **{key: value})
    assert found.messages == [{"role": "system", "content": "Be brief.\nSpeak Latin."}, USER, ANSWER]
    assert found.supervised == (False, False, True)
    assert not found.notes


def test_a_system_prompt_may_be_there_twice_but_not_say_two_things():
    system = {"role": "system", "content": "Be brief."}
    assert good(system, USER, ANSWER, system="Be brief. ").messages[0] == system
    assert good(USER, ANSWER, system="", system_prompt="Be brief.").messages[0] == system
    assert "`system` and the system message in messages[0] contradict" in reason(
        system, USER, ANSWER, system="Be long."
    )
    assert "`system` and `system_prompt` contradict" in reason(USER, ANSWER, system="a", system_prompt="b")
    assert "`system`: only text parts" in reason(USER, ANSWER, system=[{"image": "x"}])


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}


@pytest.mark.parametrize(
    "tools",
    [
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION])},
        {"tools": [FUNCTION]},
        {"tools": [{"type": "function", "function": FUNCTION}]},
        {"tools": [{"type": "function", **FUNCTION}]},
        {"tools": [FUNCTION], "functions": [FUNCTION]},
        {"tools": [{"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]}], "functions": []},
    ],
)
def test_tools_come_out_nested_from_all_their_forms(tools):
    (found,) = good(USER, ANSWER, **tools).tools
    assert found == {"type": "function", "function": FUNCTION}


def test_tools_that_cannot_be_read_are_refused():
    assert "`tools` and `functions` contradict" in reason(USER, ANSWER, tools=[FUNCTION], functions=[{"name": "g"}])
    assert "templates know no other tools" in reason(USER, ANSWER, tools=[{"type": "web_search", "name": "x"}])
    assert "tools[0]: the function has no name" in reason(USER, ANSWER, tools=[{"type": "function", "function": {}}])
    assert "`parameters` is not an object" in reason(USER, ANSWER, tools=[{"name": "f", "parameters": [1]}])


def test_the_old_form_of_calls_is_read():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": "b"}'}}
    found = good(USER, call, {"role": "function", "name": "f", "content": "ok"}, ANSWER, functions=[FUNCTION])
    function = {"name": "f", "arguments": {"a": "b"}}
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert found.messages[2] == {"role": "tool", "content": "ok", "name": "f"}


def test_harmless_keys_are_counted_and_empty_ones_are_not():
    found = good(
        {**USER, "id": 3, "name": None, "foo": None},
        {**ANSWER, "score": 0.5, "finish_reason": "stop", "annotations": [], "refusal": None},
        id="a",
        source="b",
        score=0.1,
        my_rank=7,
        question_id="q",
        num_rounds=2,
        documents=[],
        prompt="hi ",
    )
    top = ["id", "source", "score", "my_rank", "question_id", "num_rounds", "prompt"]
    inner = ["messages[].id", "messages[].score", "messages[].finish_reason"]
    assert found.notes == dict.fromkeys([f"ignored key `{key}`" for key in [*top, *inner]], 1)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("context", "Paris is in France.", "put it into a message"),
        ("prompt", "another question", "put it into a message"),
        ("instructions", "Be brief.", "name the system prompt `system`"),
        ("chosen", "x", "preference data"),
        ("label", False, "preference data"),
        ("enable_thinking", False, "chat_template_kwargs"),
        ("documents", [{"text": "x"}], "chat_template_kwargs"),
        ("available_tools", [FUNCTION], "name the list of tools `tools`"),
        ("images", ["x.png"], "is not text"),
        ("conversations", [{"from": "human", "value": "x"}], "megasft convert"),
        ("reasoning", "I think so.", "belongs to an assistant message"),
        ("train", False, "write `loss` into its assistant messages"),
        ("weight", 0.5, "[[data.mix]]"),
        ("masked", True, "write `loss`"),
        ("persona", "a pirate", "ignore_keys"),
        ("surprise", "a text of any kind", "not known and may carry meaning"),
        ("surprise", {"nested": ["text"]}, "not known and may carry meaning"),
    ],
)
def test_a_key_of_a_record_that_may_carry_meaning_is_refused_by_name_unless_it_is_to_be_ignored(key, value, remedy):
    refusal = reason(USER, ANSWER, **{key: value})
    assert f"`{key}`" in refusal
    assert remedy in refusal
    assert f"ignore_keys = ['{key}']" in refusal
    accepted = check_record({"messages": [USER, ANSWER], key: value}, "f", 1, ignore_keys=(key,))
    assert accepted.notes == {f"ignored key `{key}`": 1}


def test_a_switch_for_the_loss_of_a_whole_record_that_changes_nothing_is_harmless():
    found = good(USER, ANSWER, train=True, weight=1.0, masked=0)
    assert found.notes == {f"ignored key `{key}`": 1 for key in ("train", "weight", "masked")}


# --- in messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("text", "x", "name the text `content`"),
        ("value", "x", "megasft convert"),
        ("refusal", "I cannot.", "put the refusal into `content`"),
        ("images", ["x"], "is not text"),
        ("channel", "analysis", "not known"),
        ("Reasoning", "hm", "not known"),
        ("surprise", 3, "not known"),
        ("surprise", False, "not known"),
        ("mask", 0, "write `loss`: true or false"),
        ("ignore", True, "write `loss`: true or false"),
        ("train_detail", [{"begin": 0}], "write `loss`"),
    ],
)
def test_a_key_of_a_message_that_may_carry_meaning_is_refused_by_name_unless_it_is_to_be_ignored(key, value, remedy):
    refusal = reason(USER, {**ANSWER, key: value})
    assert f"`{key}`" in refusal
    assert remedy in refusal
    assert refusal.startswith("messages[1]: ")
    assert good(USER, {**ANSWER, key: value}, ignore=(key,)).notes == {f"ignored key `messages[].{key}`": 1}


def call(**keys):
    return {"role": "assistant", "tool_calls": [{"type": "function", **keys}]}


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_arguments_of_a_call_are_read_under_their_other_names(key):
    for given in ({"a": "b"}, '{"a": "b"}'):
        for one in (call(name="f", **{key: given}), call(function={"name": "f", key: given})):
            assert good(USER, one).messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "b"}}


def test_keys_of_calls_functions_and_parts_are_read_counted_or_refused():
    found = good(USER, call(index=0, id=7, function={"name": "f", "description": "d"}))
    assert found.messages[1]["tool_calls"][0]["id"] == "7"
    assert found.notes == {
        "ignored key `messages[].tool_calls[].index`": 1,
        "ignored key `messages[].tool_calls[].function.description`": 1,
    }
    assert "messages[1].tool_calls[0]: the key `result`" in reason(USER, call(name="f", result="18 C"))
    assert "messages[1].tool_calls[0].function: the key `kwargs`" in reason(
        USER, call(function={"name": "f", "kwargs": {"a": 1}})
    )
    assert "`arguments` stands beside `function`" in reason(USER, call(arguments={"a": 1}, function={"name": "f"}))
    assert "`arguments` and `input` are both there" in reason(USER, call(name="f", arguments={"a": 1}, input={"b": 1}))
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "image_url": None}
    assert good({"role": "user", "content": [part]}, ANSWER).notes == {
        "ignored key `messages[].content[].cache_control`": 1
    }
    assert "messages[0].content[0]: the key `loss`" in reason(
        {"role": "user", "content": [{**part, "loss": 0}]}, ANSWER
    )
    assert "only text parts" in reason({"role": "user", "content": [{"type": "tool_result", "content": "x"}]}, ANSWER)


def test_parts_are_joined_by_newlines_as_vllm_joins_them():
    parts = ["a", {"type": "text", "text": ""}, {"text": "b "}, {"type": "input_text", "text": "c"}]
    assert good({"role": "user", "content": parts}, ANSWER).messages[0]["content"] == "a\nb \nc"


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REASONING)
def test_reasoning_is_read_under_each_of_its_names(key):
    for value in (
        "I think.",
        [{"type": "reasoning.text", "text": "I think."}],
        [{"type": "thinking", "thinking": "I think."}],
        ["I think."],
    ):
        found = good(USER, {**ANSWER, key: value}).messages[1]
        assert found == {**ANSWER, "reasoning_content": "I think."}
    assert "is not text" in reason(USER, {**ANSWER, key: 3})
    assert "reasoning that is not text" in reason(USER, {**ANSWER, key: [{"type": "thinking"}]})
    assert "only assistant messages have reasoning" in reason({**USER, key: "hm"}, ANSWER)


def test_reasoning_in_parts_of_the_content_and_under_two_names():
    parts = [{"type": "thinking", "thinking": "I think.", "signature": "s"}, {"type": "text", "text": "hello"}]
    found = good(USER, {"role": "assistant", "content": parts})
    assert found.messages[1] == {**ANSWER, "reasoning_content": "I think."}
    assert found.notes == {"ignored key `messages[].content[].signature`": 1}
    assert "reasoning comes before the text" in reason(USER, {"role": "assistant", "content": parts[::-1]})
    twice = {**ANSWER, "reasoning": "I think.", "reasoning_details": [{"type": "reasoning.text", "text": "I think."}]}
    assert good(USER, twice).messages[1]["reasoning_content"] == "I think."
    beside_nothing = {**ANSWER, "reasoning": " \n", "reasoning_content": "", "thinking": "I think."}
    assert good(USER, beside_nothing).messages[1]["reasoning_content"] == "I think."
    assert "contradict" in reason(USER, {**twice, "thinking": "I do not."})
    secret = {**ANSWER, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}
    assert good(USER, secret).notes == {"ignored encrypted reasoning": 1}


# --- what is learned from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*TRAINED, *UNTRAINED])
def test_each_name_of_a_messages_mask_is_read_and_fractions_and_words_are_refused(key):
    on, off = ((True, 1, 1.0), (False, 0, 0.0)) if key in TRAINED else ((False, 0, 0.0), (True, 1, 1.0))
    for value in on:
        assert good(USER, {**ANSWER, key: value}).supervised == (False, True)
    for value in off:
        assert good(USER, {**ANSWER, key: value}, USER, ANSWER).supervised == (False, False, False, True)
    for value in (0.5, 2, -1, "true", "no", [0, 1], {"a": 1}):
        assert f"messages[1]: `{key}` can be 0 or 1" in reason(USER, {**ANSWER, key: value})
    assert "only assistant messages can be learned from" in reason({**USER, key: on[0]}, ANSWER)
    other = "loss" if key != "loss" else "weight"
    assert "contradict each other" in reason(USER, {**ANSWER, key: off[0], other: 1})


# --- nulls -----------------------------------------------------------------------------------------------------------


def arguments(given, parameters=None, name="f"):
    tools = [] if parameters is None else [{"name": "f", "parameters": parameters}]
    found = good(USER, call(name=name, arguments=given), tools=tools)
    return found.messages[1]["tool_calls"][0]["function"]["arguments"], found.notes["null arguments left out"]


def test_a_null_argument_stays_where_the_tools_schema_allows_it_and_is_left_out_elsewhere():
    null = [
        {"type": "null"}, {"type": ["string", "null"]}, {"nullable": True, "type": "string"}, {"enum": ["a", None]},
        {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"description": "of any type"}, {"$ref": "#/$defs/maybe"},
    ]  # fmt: skip
    never = [
        {"type": "string"}, {"type": ["string", "integer"]}, {"enum": ["a"]}, {"anyOf": [{"type": "string"}]}, None,
        {"$ref": "#/$defs/text"}, {"properties": {"a": {}}},
    ]  # fmt: skip
    definitions = {"maybe": {"type": ["string", "null"]}, "text": {"type": "string"}}
    for schemas, kept in ((null, True), (never, False)):
        for schema in schemas:
            parameters = {"type": "object", "properties": {"x": schema}, "$defs": definitions}
            assert arguments({"x": None, "y": 1}, parameters) == ({"x": None, "y": 1} if kept else {"y": 1}, not kept)


def test_nulls_deep_in_arguments_follow_the_schema_and_lists_keep_theirs():
    inner = {"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": {"type": "string"}}}
    parameters = {
        "type": "object",
        "properties": {
            "one": inner,
            "many": {"type": "array", "items": inner},
            "maybe": {"anyOf": [inner, {"type": "null"}]},
        },
        "additionalProperties": {"type": ["integer", "null"]},
    }
    value = {"a": None, "b": None, "c": None}
    given = {"one": value, "many": [value, None], "maybe": value, "other": None}
    assert arguments(given, parameters) == (
        {"one": {"a": None}, "many": [{"a": None}, None], "maybe": {"a": None}, "other": None},
        6,
    )
    assert arguments({"x": None, "y": {"z": None}}) == ({"y": {}}, 2)  # no schema: it says nothing
    assert arguments({"x": None}, {"type": "object", "properties": {"x": {}}}, name="g") == ({}, 1)


def test_nulls_in_schemas_are_left_out_but_for_a_default_that_may_be_null():
    schema = {"type": "string", "enum": None, "default": None, "description": None}
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    properties = {"a": schema, "b": nullable, "c": None}
    found = good(
        USER, ANSWER, tools=[{"name": "f", "strict": None, "parameters": {"properties": properties, "required": None}}]
    )
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": nullable}}}
    assert found.tools == [{"type": "function", "function": function}]
    assert found.notes == {"nulls left out of `tools`": 6}


def test_objects_that_a_table_filled_with_nulls_are_not_there():
    filled = {"name": None, "arguments": None}
    calls = [{"id": None, "function": filled}]
    question = {
        **USER,
        "function_call": filled,
        "tool_calls": calls,
        "reasoning_details": [{"text": None}],
        "foo": [{}],
    }
    found = good(
        question, {**ANSWER, "function_call": filled, "audio": {"id": None}}, metadata={"a": None}, persona=[None]
    )
    assert found.messages == [USER, ANSWER]
    inner = {"function_call": 2, "tool_calls": 1, "reasoning_details": 1, "foo": 1, "audio": 1}
    expected = {f"ignored key `messages[].{key}`": count for key, count in inner.items()}
    assert found.notes == expected | {"ignored key `metadata`": 1, "ignored key `persona`": 1}


# --- variables of the template ---------------------------------------------------------------------------------------


def test_variables_for_the_template_are_read_and_those_of_the_rendering_itself_refused():
    assert good(USER, ANSWER, chat_template_kwargs={"enable_thinking": False, "x": None}).template_args == {
        "enable_thinking": False
    }
    assert "sets `tools`" in reason(USER, ANSWER, chat_template_kwargs={"tools": []})
    assert "is not an object" in reason(USER, ANSWER, chat_template_kwargs=[1])


def test_other_columns_of_a_parquet_file_are_counted_or_refused_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [USER, ANSWER], "id": 1, "persona": None},
        {"messages": [USER, ANSWER], "id": 2, "persona": "a pirate"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    fine, refused = read_conversations(tmp_path / "rows.parquet")
    assert fine.notes == {"ignored key `id`": 1}
    assert "`persona`" in refused.reason
