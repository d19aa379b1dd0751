"""Conversations of more than so many tokens: what is kept of them, and that no sample begins in the middle of one."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.data.conversations import Conversation, check_record, read_conversations
from megasft.data.overlong import Encoded, Turn, fit
from megasft.data.template import encode

CASES = Path(__file__).parent / "cases"


def sample(mask, preamble=0, turns=()):
    """Tokens 0, 1, 2, ...; x are targets."""
    return Encoded(np.arange(len(mask), dtype=np.int32), np.array([c == "x" for c in mask]), preamble, turns)


def test_length_policies():
    #              sys, request, answer, request, answer
    long = sample("....xx..xx", 2, (Turn(4, 6, 2, 4), Turn(8, 10, 6, 8)))
    cases = {
        "drop": [],
        "truncate_left": [[4, 5, 6, 7, 8, 9]],
        "truncate_right": [[0, 1, 2, 3, 4, 5]],
        "split_turns": [[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8, 9]],
    }
    for policy, expected in cases.items():
        counts = Counter()
        pieces = fit(long, 6, policy, counts)
        assert [piece.ids.tolist() for piece in pieces] == expected
        assert counts["samples"] == len(expected)
        assert not any(piece.mask[0] for piece in pieces)
        assert fit(long, 10, policy) == [long]
    assert fit(long, 6, "truncate_left")[0].mask.tolist() == [False, True, False, False, True, True]


def test_a_sample_without_anything_to_predict_is_dropped_and_counted():
    counts = Counter()
    assert fit(sample("......xx"), 4, "truncate_right", counts) == []
    assert fit(sample("xx......"), 4, "truncate_left", counts) == []
    assert fit(sample("..x....."), 6, "truncate_left", counts) == []  # its first token: nothing predicts it
    assert +counts == {"dropped": 3, "emptied": 3, "targets cut": 5, "tokens cut": 24}


def test_what_is_cut_off_is_counted_in_tokens_and_targets():
    counts = Counter()
    fit(sample("....xxxx"), 6, "truncate_right", counts)
    fit(sample("....xx"), 6, "truncate_right", counts)
    assert +counts == {"truncated": 1, "kept": 1, "samples": 2, "targets cut": 2, "tokens cut": 2}


#                 sys, request, call, reply, call, reply, answer, request, answer
WORK = ".......xx...xx...xx..xx"
TURNS = (Turn(7, 9, 3, 7), Turn(12, 14, 3, 7), Turn(17, 19, 3, 7), Turn(21, 23, 19, 21))


def split(limit, mask=WORK, turns=TURNS):
    return [piece.ids.tolist() for piece in fit(sample(mask, 3, turns), limit, "split_turns")]


def test_a_request_that_is_worked_on_for_longer_stays_in_front_with_the_last_call_and_its_reply():
    system, request = [0, 1, 2], [3, 4, 5, 6]
    assert split(14) == [
        [*system, *request, *range(7, 14)],
        [*system, *request, *range(12, 19)],  # tokens 12 to 16, the call before and its reply, are not learned again
        [*system, *range(19, 23)],
    ]
    pieces = fit(sample(WORK, 3, TURNS), 14, "split_turns")
    assert pieces[1].ids[pieces[1].mask].tolist() == [17, 18]


def test_where_the_last_reply_does_not_fit_the_request_stays_and_where_it_does_not_fit_its_turns_are_dropped():
    system, request = [0, 1, 2], [3, 4, 5, 6]
    assert split(10)[1:3] == [[*system, *request, 12, 13], [*system, *request, 17, 18]]
    assert split(6) == [[*request, 12, 13], [*request, 17, 18], [*system, 19, 20, 21]]
    counts = Counter()
    pieces = fit(sample(WORK, 3, TURNS), 4, "split_turns", counts)
    assert [piece.ids.tolist() for piece in pieces] == [[19, 20, 21, 22]]
    assert counts["targets cut"] == 6


@st.composite
def works(draw):
    """A conversation of random turns, as `sample` takes it."""
    preamble = draw(st.integers(0, 5))
    mask, turns, asked, asked_end = "." * preamble, [], preamble, 0
    for k in range(draw(st.integers(1, 8))):
        before = draw(st.integers(1, 6))
        if k == 0 or draw(st.booleans()):
            asked, asked_end = len(mask), len(mask) + before
        mask += "." * before
        said = draw(st.integers(1, 8))
        turns.append(Turn(len(mask), len(mask) + said, asked, asked_end))
        mask += "x" * said
    return sample(mask, preamble, tuple(turns))


@given(works(), st.integers(2, 30))
def test_splitting_loses_no_turn_that_fits_behind_the_system_prompt_and_its_request(long, limit):
    seen = {token for piece in fit(long, limit, "split_turns") for token in piece.ids[piece.mask].tolist()}
    for turn in long.turns:
        context = long.preamble + turn.asked_end - turn.asked
        if context + turn.end - turn.answer <= limit and context * 4 // 3 <= limit:
            assert set(range(turn.answer, turn.end)) <= seen


@given(works(), st.integers(2, 30))
def test_splitting_supervises_no_token_twice_and_every_sample_has_the_request_in_front(long, limit):
    pieces = fit(long, limit, "split_turns")
    seen = [token for piece in pieces for token in piece.ids[piece.mask]]
    assert len(seen) == len(set(seen))
    for piece in pieces:
        assert 2 <= len(piece) <= limit
        assert piece.mask[1:].any()
        assert len(set(piece.ids)) == len(piece)
        if len(long) > limit:
            first = int(piece.ids[piece.mask][0])
            turn = next(turn for turn in long.turns if turn.answer <= first < turn.end)
            assert set(range(turn.asked, turn.asked_end)) <= set(piece.ids.tolist())
            begins = [0, *(turn.asked for turn in long.turns), *(turn.answer for turn in long.turns)]
            jumps = [b for a, b in itertools.pairwise(piece.ids.tolist()) if b != a + 1]
            assert {int(piece.ids[0]), *jumps} <= set(begins)


# --- conversations ---------------------------------------------------------------------------------------------------


def texts(tokenizer, conversation, limit):
    assert isinstance(conversation, Conversation)
    encoded = encode(conversation, tokenizer)
    return [tokenizer.decode(piece.ids) for piece in fit(encoded, limit or len(encoded) - 1, "split_turns")]


@pytest.mark.parametrize("template", ["thinking", "xml_calls"])
def test_case_13_no_sample_begins_with_a_tool_reply(with_template, template):
    tokenizer = with_template(template)
    (conversation,) = read_conversations(CASES / "13-split-turns.jsonl")
    whole = encode(conversation, tokenizer)
    request = "<|im_start|>user\nFind the bug in parse.py and fix it.<|im_end|>\n<|im_start|>assistant"
    for limit in range(100, len(whole)):
        pieces = fit(whole, limit, "split_turns")
        assert len(pieces) > 1
        for piece in pieces:
            text = tokenizer.decode(piece.ids)
            assert request in text
            before_reply = text.partition("<tool_response>")[0]
            assert "<tool_response>" not in text or "</tool_call>" in before_reply
        targets = sum(int(piece.mask.sum()) for piece in pieces)
        longest = max(turn.asked_end + turn.end - turn.answer for turn in whole.turns)
        assert targets == int(whole.mask.sum()) or limit < longest
    assert longest < len(whole) - 1


def test_a_request_behind_tool_replies_begins_a_sample(with_template):
    """The user may speak where the assistant would have answered a tool reply."""
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "1"}}]}
    messages = [{"role": "user", "content": "first " * 9}, call, {"role": "tool", "content": "reply " * 9}]
    messages += [{"role": "user", "content": "second"}, {"role": "assistant", "content": "third"}]
    pieces = texts(with_template("xml_calls"), check_record({"messages": messages}, "f", 1), None)
    assert pieces[1].startswith("<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\nthird<|im_end|>")


def test_turns_are_cut_where_the_user_speaks(with_template):
    tokenizer = with_template("thinking")
    words = ["one", "two", "three", "four", "five", "six"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
    conversation = check_record({"system": "Be brief.", "messages": turns}, "f", 1)
    encoded = encode(conversation, tokenizer)
    pieces = fit(encoded, len(encoded) - 1, "split_turns") + fit(encoded, len(encoded) // 2, "split_turns")
    assert len(pieces) >= 4
    for piece in pieces:
        assert tokenizer.decode(piece.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    learned = sum(int(piece.mask.sum()) for piece in pieces[:2])
    assert learned == int(encoded.mask.sum())
    assert json.dumps(words[1]) not in tokenizer.decode(pieces[1].ids)
