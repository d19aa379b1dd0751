"""Whatever a record holds, and whatever the template: what the assistant says is learned in full, no text vanishes.

Random conversations under six templates, and 10,000 fuzzed records: each is either in the samples as it should be, or
named with its line.
"""

import json
import random
import re
from collections import Counter
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasft.data.conversations import Conversation, Problem, check_record
from megasft.data.record_keys import ARGUMENTS, MESSAGE, REASONING, RECORD, SYSTEM, TRAINED, UNTRAINED
from megasft.data.template import encode, encode_many

TEMPLATES = ["thinking", "xml_calls", "chatml", "header_ids", "gen_content_only", "forgetful"]
CLOSING = {"header_ids": "<|eot_id|>"}

WORDS = st.lists(
    st.sampled_from(
        ["one", "two,", "three", "<b>", "four?", "<think>", "</think>", "五", "\n", "\n\n", "```x```", '{"a":1}']
    ),
    min_size=1,
    max_size=5,
)
SAYING = WORDS.map(" ".join).filter(str.strip)
NAMES = st.sampled_from(["f", "search", "get_weather"])
ARGUMENT_VALUES = st.recursive(
    SAYING | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    NAMES,
    st.dictionaries(st.sampled_from(["city", "days", "to"]), ARGUMENT_VALUES, max_size=3),
)


@st.composite
def records(draw):
    """A system prompt or none, then rounds of questions, calls with replies, and answers; some thought over."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(SAYING)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(SAYING)})
        for calls in draw(st.lists(st.lists(CALLS, min_size=1, max_size=2), max_size=2)):
            messages.append({"role": "assistant", "content": draw(st.just("") | SAYING), "tool_calls": calls})
            messages += [{"role": "tool", "content": draw(SAYING)} for _ in calls]
        messages.append({"role": "assistant", "content": draw(SAYING), "loss": draw(st.booleans())})
    for message in messages:
        if message["role"] == "assistant" and draw(st.integers(0, 3)) == 0:
            message[draw(st.sampled_from(REASONING[:4]))] = draw(SAYING)
    messages[-1]["loss"] = True
    tools = [{"type": "function", "function": {"name": name, "description": "d"}} for name in draw(st.sets(NAMES))]
    return {"messages": messages} | ({"tools": tools} if tools else {})


def runs(tokenizer, encoded):
    found = groupby(range(len(encoded)), key=encoded.mask.__getitem__)
    return [tokenizer.decode(encoded.ids[list(run)]) for supervised, run in found if supervised]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=records())
def test_every_supervised_message_is_learned_from_its_first_token_to_its_closing_one_or_named(
    with_template, template, record
):
    tokenizer = with_template(template)
    conversation = check_record(record, "data.jsonl", 7)
    assert isinstance(conversation, Conversation), conversation
    result = encode(conversation, tokenizer)
    if isinstance(result, Problem):
        assert (result.file, result.line) == ("data.jsonl", 7)
        assert re.search(r"messages\[\d+\]|`tools`|the chat template fails|nothing to learn", result.reason), (
            result.reason
        )
        return
    messages = [m for m, on in zip(conversation.messages, conversation.supervised, strict=True) if on]
    learned = runs(tokenizer, result)
    assert len(learned) == len(messages)
    for message, text in zip(messages, learned, strict=True):
        closing = CLOSING.get(template, "<|im_end|>")
        assert text.endswith(closing)
        assert text.count(closing) == 1
        said, place = text.removesuffix(closing), 0
        for part in (message.get("reasoning_content", ""), message["content"].strip()):
            if "</think>" not in part:  # which the template may take apart
                assert part.strip() in said[place:]
                place = said.index(part.strip(), place) + len(part.strip())
        if (
            not message.get("reasoning_content")
            and "tool_calls" not in message
            and "</think>" not in message["content"]
        ):
            assert said.removeprefix("<think>\n\n</think>\n\n").strip() == message["content"].strip()
        for call in message.get("tool_calls", ()):
            function = call["function"]
            assert function["name"] in said[place:]
            for key, value in function["arguments"].items():
                assert key in said[place:]
                assert (
                    not isinstance(value, str) or value in said or json.dumps(value, ensure_ascii=False)[1:-1] in said
                )


def test_most_random_conversations_are_accepted_by_a_template_that_has_a_place_for_all(with_template):
    """So that the property above is not one of refusals."""
    tokenizer = with_template("thinking")
    accepted = Counter()

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(record=records())
    def count(record):
        result = encode(check_record(record, "f", 1), tokenizer, lost_reasoning="accept")
        accepted[type(result).__name__] += 1

    count()
    assert accepted["Encoded"] > 20


# --- fuzzed records --------------------------------------------------------------------------------------------------

EXTRA = [
    *RECORD,
    *MESSAGE,
    *ARGUMENTS,
    *REASONING,
    *SYSTEM,
    *TRAINED,
    *UNTRAINED,
    "foo",
    "Reasoning",
    "my_note",
    "x_id",
]


def fuzzed(rng, number):
    """A record with all that people write, and the texts that are planted in it, each with a word of its own."""
    planted = []

    def text(short=False):
        planted.append(f"w{number}x{len(planted)}z")
        return (
            planted[-1]
            if short or rng.random() < 0.3
            else f"{rng.choice(['Some', 'a', '', '<b>', '# '])} {planted[-1]} {rng.choice(['text.', '', '!'])}"
        )

    def nested(depth=0):
        kind = rng.randrange(6 if depth < 3 else 3)
        if kind == 0:
            return rng.choice([None, None, True, 0, 1, -2.5, 10**20])
        if kind < 3:
            return text()
        if kind == 3:
            return [nested(depth + 1) for _ in range(rng.randrange(3))]
        return {
            rng.choice(["a", "b", "text", "type", text(short=True)]): nested(depth + 1) for _ in range(rng.randrange(3))
        }

    def content():
        kind = rng.random()
        if kind < 0.8:
            return text()
        if kind < 0.95:
            return [
                rng.choice([text(), {"type": "text", "text": text()}, {"text": text()}])
                for _ in range(rng.randint(1, 3))
            ]
        return nested()

    def decorate(found, chance):
        while rng.random() < chance:
            found[rng.choice(EXTRA)] = nested()
        return found

    def call():
        arguments = {rng.choice(["city", "query", text(short=True)]): nested() for _ in range(rng.randrange(3))}
        arguments = json.dumps(arguments) if rng.random() < 0.3 else arguments
        function = {"name": rng.choice(["f", "g"]), rng.choice([*ARGUMENTS, "arguments", "arguments"]): arguments}
        nest = {"type": "function", "function": function} if rng.random() < 0.6 else function
        return decorate(nest, 0.1)

    messages = []
    if rng.random() < 0.4:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": content()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": content()})
        if rng.random() < 0.3:
            messages.append(
                {
                    "role": "assistant",
                    "content": rng.choice([None, text()]),
                    "tool_calls": [call() for _ in range(rng.randint(1, 2))],
                }
            )
            messages += [
                {"role": rng.choice(["tool", "tool", "function"]), "content": content()}
                for _ in range(rng.randint(0, 2))
            ]
        answer = {"role": "assistant", "content": content()}
        if rng.random() < 0.3:
            answer[rng.choice(REASONING)] = rng.choice([text(), text(), nested()])
        if rng.random() < 0.3:
            answer[rng.choice([*TRAINED, *UNTRAINED])] = rng.choice([0, 1, True, False, None, 0.5, "yes"])
        messages.append(answer)
        if rng.random() < 0.1:
            messages.append({"role": rng.choice(["system", "tool", "user"]), "content": content()})
    messages = [decorate(message, 0.04) for message in messages]
    record = {"messages": messages}
    if rng.random() < 0.3:
        properties = {name: rng.choice([None, {"type": "string"}]) for name in ("city", "query")}
        record[rng.choice(["tools", "functions"])] = [
            {"name": "f", "parameters": {"type": "object", "properties": properties}},
            {"type": "function", "function": {"name": "g"}},
        ]
    if rng.random() < 0.2:
        record[rng.choice(SYSTEM)] = content()
    return decorate(record, 0.1), planted


def dropped(record, notes):
    """The texts at keys that the notes list, and the names of arguments that were null."""
    names = {re.fullmatch(r"ignored key `(?:.*\.)?(\w+)`", note)[1] for note in notes if note.startswith("ignored key")}
    unseen = {"`name`": ("name", "tool_name"), "`tool_call_id`": ("tool_call_id", "call_id"), "`id`": ("id",)}
    names.update(key for note in notes if "chat template leaves out" in note for key in unseen.get(note.split()[0], ()))
    found, todo = [], [record]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                (found if key in names else todo).append(item)
        elif isinstance(value, list):
            todo += value
    if "null arguments left out" in notes:
        found += re.findall(r'(\w+)\\*": null', json.dumps(record))
    return json.dumps(found, ensure_ascii=False)


@pytest.mark.parametrize("template", ["thinking", "xml_calls"])
def test_of_5000_fuzzed_records_every_text_is_in_the_rendering_or_reported(with_template, template):
    """For each of two templates: 10,000 in all."""
    rng = random.Random(template)
    tokenizer = with_template(template)
    outcomes = Counter()
    made = [fuzzed(rng, number) for number in range(5000)]
    read = [check_record(json.loads(json.dumps(record)), "data.jsonl", i) for i, (record, _) in enumerate(made, 1)]
    good = [one for one in read if isinstance(one, Conversation)]
    encoded = iter(encode_many(good, tokenizer, lost_reasoning="accept"))
    for line, (one, (record, planted)) in enumerate(zip(read, made, strict=True), 1):
        result = one if isinstance(one, Problem) else next(encoded)
        if isinstance(result, Problem):
            assert result.line == line
            assert result.reason
            outcomes["reported"] += 1
            continue
        outcomes["trained"] += 1
        text, notes = tokenizer.decode(result.ids), one.notes + result.notes
        missing = [word for word in planted if word not in text and word in json.dumps(record)]
        if missing:
            outcomes["with notes"] += 1
            elsewhere = dropped(record, notes)
            reasoning = json.dumps([m.get("reasoning_content") for m in one.messages])
            lost = any("reasoning" in note for note in notes)
            unexplained = [word for word in missing if word not in elsewhere and not (lost and word in reasoning)]
            assert not unexplained, (line, unexplained, notes, record)
    assert outcomes["trained"] > 1000
    assert outcomes["reported"] > 1000
    assert outcomes["with notes"] > 100
