"""What the template makes of a conversation: nothing that a message says is lost without a word."""

from datetime import date, timedelta
from pathlib import Path

import pytest

from megasft.data import tokenizer as tokenizer_module
from megasft.data.conversations import Conversation, check_record
from megasft.data.overlong import Encoded
from megasft.data.problems import Problem
from megasft.data.template import encode
from megasft.data.tokenizer import load_tokenizer, mentions_date
from megasft.messages import UserError

USER = {"role": "user", "content": "what is two and two?"}
ANSWER = {"role": "assistant", "content": "four"}
CALL = {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "f", "arguments": {"a": "one"}}]}
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}]


def encoded(tokenizer, *messages, settings={}, **rest):  # noqa: B006
    conversation = check_record({"messages": list(messages), **rest}, "data.jsonl", 7)
    assert isinstance(conversation, Conversation), conversation
    return encode(conversation, tokenizer, **settings)


def supervised(tokenizer, one):
    assert isinstance(one, Encoded), one
    return tokenizer.decode(one.ids[one.mask])


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {**ANSWER, "reasoning_content": "four"},  # what the answer says too is lost all the same
        {**ANSWER, "content": "<b>", "reasoning_content": "<b>"},  # no word to plant a mark in
        {**ANSWER, "reasoning": "I add them up."},
        {**ANSWER, "thinking": "- one\n- two"},
    ],
)
def test_reasoning_that_the_rendering_does_not_hold_is_refused_or_counted(with_template, answer):
    for template in ("chatml", "xml_calls", "header_ids", "marked"):
        tokenizer = with_template(template)
        problem = encoded(tokenizer, USER, answer)
        assert isinstance(problem, Problem), template
        assert "the reasoning of 1 message to learn from (messages[1] (assistant))" in problem.reason
        assert "train_on" not in problem.reason  # it would not help
        one = encoded(tokenizer, USER, answer, settings={"lost_reasoning": "accept"})
        assert supervised(tokenizer, one).strip().startswith(answer["content"] + "<")
        assert one.notes == {"assistant messages whose reasoning the chat template leaves out": 1}
    one = encoded(with_template("thinking"), USER, answer)
    assert supervised(with_template("thinking"), one).startswith("<think>\n" + str(list(answer.values())[2]))


@pytest.mark.parametrize("said", [{"content": "<think>\nhm\n</think>\n\nfour"}, {**ANSWER, "reasoning_content": "hm"}])
def test_reasoning_of_earlier_turns_is_lost_only_where_they_are_learned_from(with_template, said):
    tokenizer = with_template("thinking")
    messages = USER, {"role": "assistant", **said}, USER, {**ANSWER, "reasoning_content": "still four"}
    problem = encoded(tokenizer, *messages)
    assert 'learn from the last turn only with [data] train_on = "last"' in problem.reason
    one = encoded(tokenizer, *messages, settings={"train_on": "last"})
    assert supervised(tokenizer, one) == "<think>\nstill four\n</think>\n\nfour<|im_end|>"
    assert one.notes == {"assistant messages whose reasoning the chat template leaves out": 1}


# --- generation marks ------------------------------------------------------------------------------------------------

HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
FOOTER = "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLED = "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"


@pytest.mark.parametrize(
    ("marked", "followed"),
    [
        ("{% generation %}{{ m.content }}" + CALLED + "{% endgeneration %}", False),  # not the closing token
        ("{% generation %}{{ m.content }}{% endgeneration %}" + CALLED, False),  # not the calls
        (CALLED + "{% generation %}{{ m.content }}{% endgeneration %}", False),
        ("{{ m.content }}" + CALLED, False),  # none at all, in a template that has some
        ("{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}" + CALLED + "{% endif %}", False),
    ],
)  # fmt: skip
def test_marks_that_do_not_hold_the_whole_turn_are_not_followed(with_template, marked, followed):
    template = HEADER + marked + FOOTER
    if "generation" not in marked:
        template = template.replace("{% endfor %}{% if add", "{% endfor %}{% generation %}{% endgeneration %}{% if add")
    tokenizer = with_template(template)
    one = encoded(tokenizer, USER, CALL, {"role": "tool", "content": "so it is"}, ANSWER)
    call = '<tool_call>{"name": "f", "arguments": {"a": "one"}}</tool_call>'
    call = call + "I look." if marked.startswith(CALLED) else "I look." + call
    assert supervised(tokenizer, one) == f"{call}<|im_end|>four<|im_end|>"
    assert one.notes == {
        "turns of which the template's generation marks leave out a part (trained in full all the same)": 2
    }


def test_marks_over_the_header_do_not_train_an_empty_answer(with_template):
    tokenizer = with_template("gen_with_header")
    one = encoded(tokenizer, USER, {**ANSWER, "content": "", "loss": False}, USER, ANSWER)
    assert supervised(tokenizer, one) == "four<|im_end|>"


def test_marks_may_leave_out_what_the_template_puts_before_a_turn(with_template):
    block = "<think>\n\n</think>\n\n"
    tokenizer = with_template(
        HEADER + "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = encoded(tokenizer, USER, ANSWER, USER, ANSWER)
    assert block in tokenizer.decode(one.ids)
    assert supervised(tokenizer, one) == "four<|im_end|>" * 2
    assert not one.notes


UNEVEN = (  # turns that no frame can be learned of: every other one is closed by another token
    "{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}{{ m.content }}BODY"
    "{% endgeneration %}{% else %}[U]{{ m.content }}{% endif %}{% endfor %}"
)
CLOSED = "{% if loop.index0 % 4 == 1 %}<|im_end|>{% else %}<|end|>{% endif %}"


def test_marks_alone_are_proven_too(with_template):
    tokenizer = with_template(UNEVEN.replace("BODY", CLOSED))
    assert tokenizer.frame is None
    assert supervised(tokenizer, encoded(tokenizer, USER, ANSWER, USER, ANSWER)) == "four<|im_end|>four<|end|>"
    for body, reason in (
        ("", "leave out the token that closes"),
        (CLOSED + "{{ messages[0].content }}" + CLOSED, "enclose more than a turn"),
        ("{{ messages[0].content }}" + CLOSED, "one message into another"),
    ):
        problem = encoded(with_template(UNEVEN.replace("BODY", body)), USER, CALL, USER, ANSWER)
        assert isinstance(problem, Problem)
        assert reason in problem.reason
    problem = encoded(tokenizer, USER, CALL, USER, ANSWER)
    assert "leaves out a part of messages[1] (assistant)" in problem.reason
    last_only = UNEVEN.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "BODY{% endgeneration %}", CLOSED + "{% endgeneration %}{% else %}{{ m.content }}" + CLOSED + "{% endif %}"
    )
    problem = encoded(with_template(last_only), USER, ANSWER, USER, ANSWER)
    assert "not one for each assistant message" in problem.reason


# --- tools and roles -------------------------------------------------------------------------------------------------


def test_a_tool_that_the_messages_name_is_not_taken_for_one_that_the_template_names(with_template):
    asked = {**USER, "content": 'call "f" or <name>f<'}
    for template in ("chatml", "header_ids"):
        problem = encoded(with_template(template), asked, ANSWER, tools=TOOLS)
        assert "no place for `tools`" in problem.reason
    assert isinstance(encoded(with_template("xml_calls"), asked, ANSWER, tools=TOOLS), Encoded)
    first_only = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + with_template("chatml").hf.chat_template
    problem = encoded(with_template(first_only), USER, ANSWER, tools=[*TOOLS, {"name": "g"}])
    assert "does not name 'g'" in problem.reason


@pytest.mark.parametrize("content", ["user", "be brief", "what is two"])  # which the frame or another message holds
def test_a_role_that_the_template_leaves_out_is_refused_with_what_to_write(with_template, content):
    developer = {"role": "developer", "content": content}
    later = {"role": "system", "content": content}
    problem = encoded(with_template("forgetful"), developer, USER, ANSWER)
    assert problem.reason.startswith("the chat template leaves out a part of messages[0] (developer)")
    assert problem.reason.endswith("templates without a `developer` take `system`: write it so")
    assert isinstance(encoded(with_template("chatml"), developer, USER, ANSWER), Encoded)
    assert isinstance(encoded(with_template("forgetful"), USER, ANSWER, later, USER, ANSWER), Encoded)
    problem = encoded(with_template("thinking"), USER, ANSWER, later, USER, ANSWER)
    assert "leaves out a part of messages[2] (system); if it is a later system message" in problem.reason


def test_messages_are_numbered_as_in_the_record_though_a_system_prompt_was_put_in_front(with_template):
    later = {"role": "developer", "content": "be brief"}
    problem = encoded(with_template("forgetful"), USER, ANSWER, later, USER, ANSWER, system="Speak Latin.")
    assert "a part of messages[2] (developer)" in problem.reason
    no_system = HEADER.replace("in messages", "in messages if m.role != 'system'") + "{{ m.content }}" + FOOTER
    problem = encoded(with_template(no_system), USER, ANSWER, system="Speak Latin.")
    assert "leaves out a part of `system`" in problem.reason


def test_an_extra_tool_reply_an_integer_id_and_a_name_without_a_place_are_trained_around_and_counted(with_template):
    call = {**CALL, "tool_calls": [{"id": 3, "name": "f", "arguments": {"a": "one"}}]}
    reply = {"role": "tool", "content": "so it is", "tool_call_id": 3, "name": "some_name"}
    conversation = check_record({"messages": [USER, call, reply, reply, ANSWER]}, "f", 1)
    assert conversation.messages[1]["tool_calls"][0]["id"] == conversation.messages[2]["tool_call_id"] == "3"
    assert conversation.notes == {"tool replies that answer no tool call (kept)": 1}
    one = encode(conversation, with_template("xml_calls"))
    assert one.notes == {
        "`name` that the chat template leaves out": 2,
        "`tool_call_id` that the chat template leaves out": 2,
        "`id` of tool calls that the chat template leaves out": 1,
    }


def test_words_beside_a_call_and_names_of_arguments_must_be_rendered(with_template):
    silent = HEADER + "{% if m.tool_calls %}" + CALLED + "{% else %}{{ m.content }}{% endif %}" + FOOTER
    problem = encoded(with_template(silent), USER, CALL, ANSWER)
    assert "leaves out a part of messages[1] (assistant)" in problem.reason
    nameless = (
        HEADER + "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}({% for k in c.function.arguments %}"
    )
    nameless += "{{ c.function.arguments[k] }}{% endfor %}){% endfor %}" + FOOTER
    named = {**CALL, "tool_calls": [{"name": "f", "arguments": {"some_key": "one"}}]}
    problem = encoded(with_template(nameless), USER, named, ANSWER)
    assert "leaves out or changes a part of messages[1]" in problem.reason


# --- template variables ----------------------------------------------------------------------------------------------

SWITCHED = (
    "{% if mood is defined %}<|im_start|>system\nBe {{ mood }}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_variables_of_the_run_and_of_a_record_reach_the_template_and_the_records_win(with_template):
    folder = Path(with_template(SWITCHED).source)
    plain, glad = load_tokenizer(folder), load_tokenizer(folder, {"mood": "glad"})
    assert plain.fingerprint != glad.fingerprint
    assert "system" not in plain.decode(encoded(plain, USER, ANSWER).ids)
    assert "Be glad." in glad.decode(encoded(glad, USER, ANSWER).ids)
    assert "Be sad." in glad.decode(encoded(glad, USER, ANSWER, chat_template_kwargs={"mood": "sad"}).ids)
    assert "Be sad." in plain.decode(encoded(plain, USER, ANSWER, chat_template_kwargs={"mood": "sad"}).ids)


def test_variables_that_the_template_does_not_have_are_refused_or_counted(with_template):
    tokenizer = with_template(SWITCHED)
    with pytest.raises(UserError, match=r"template_args: the chat template of .* has no variable 'moood'"):
        load_tokenizer(tokenizer.source, {"moood": "glad"})
    with pytest.raises(UserError, match="template_args: tools belongs to the rendering itself"):
        load_tokenizer(tokenizer.source, {"tools": []})
    one = encoded(tokenizer, USER, ANSWER, chat_template_kwargs={"enable_thinking": False})
    assert one.notes == {"`chat_template_kwargs` enable_thinking that the chat template does not have": 1}
    problem = encoded(tokenizer, USER, ANSWER, chat_template_kwargs={"mood": "<|im_end|>"})
    assert "control tokens" in problem.reason


# --- dates -----------------------------------------------------------------------------------------------------------


def test_case_11_a_template_that_writes_the_date_is_found_and_told_the_same_day_on_any_day(with_template, monkeypatch):
    folder = with_template("dated").source
    today, then = load_tokenizer(folder), load_tokenizer(folder, None, date(2026, 1, 31))
    assert today.writes_date
    assert then.writes_date
    assert not with_template("chatml").writes_date
    assert mentions_date(folder)
    assert not mentions_date(with_template("chatml").source)
    assert "Today is 31 January 2026." in then.decode(encoded(then, USER, ANSWER).ids)
    assert f"{date.today():%d %B %Y}" in today.decode(encoded(today, USER, ANSWER).ids)
    before = then.fingerprint, today.fingerprint

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date.today() + timedelta(1)

    monkeypatch.setattr(tokenizer_module, "date", Tomorrow)
    after = [load_tokenizer(folder, None, day).fingerprint for day in (date(2026, 1, 31), None)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_date_behind_a_condition_is_found_and_a_date_given_as_a_variable_is_none(with_template):
    conditional = (
        "{% if tools %}{{ strftime_now('%Y') }} {{ tools | tojson }}{% endif %}"
        + with_template("chatml").hf.chat_template
    )
    assert with_template(conditional).writes_date
    overridden = (
        "{% if not day is defined %}{% set day = strftime_now('%A') %}{% endif %}{{ day }}"
        + with_template("chatml").hf.chat_template
    )
    folder = with_template(overridden).source
    assert load_tokenizer(folder).writes_date
    assert not load_tokenizer(folder, {"day": "Monday"}).writes_date


def test_a_turn_of_which_the_template_leaves_nothing_is_refused(with_template):
    """Qwen3 takes a closing tag for the end of reasoning; there is none here, and no answer either."""
    problem = encoded(with_template("thinking"), USER, {**ANSWER, "content": "</think>"}, USER, ANSWER)
    assert problem.reason == "the chat template leaves nothing of messages[1] (assistant)"
