"""Faults that users of tools like this one reported, each as the input that showed it and what is right.

The inputs are in cases/, the templates in templates/. What is tested here of one input is tested of its kind in
test_conversations.py, test_rendering.py and test_overlong.py.
"""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megasft.data.conversations import Conversation, read_conversations
from megasft.data.overlong import Encoded
from megasft.data.problems import Problem
from megasft.data.template import encode
from megasft.data.token_cache import prepare
from megasft.data.tokenize import Recipe
from megasft.data.validate import print_report, validate_dataset
from megasft.messages import UserError

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def case(with_template):
    """The encoded conversations of a case under a template, and what the model is taught of each."""

    def read(name, template, **settings):
        tokenizer = with_template(template)
        found = [encode(one, tokenizer, **settings) for one in read_conversations(CASES / f"{name}.jsonl")]
        return [
            one if isinstance(one, Problem) else (tokenizer.decode(one.ids), learned(tokenizer, one)) for one in found
        ]

    return read


def learned(tokenizer, encoded):
    """The decoded text of each run of supervised tokens."""
    assert isinstance(encoded, Encoded)
    runs = groupby(range(len(encoded)), key=encoded.mask.__getitem__)
    return [tokenizer.decode(encoded.ids[list(run)]) for supervised, run in runs if supervised]


def test_case_01_system_becomes_the_first_message_and_functions_become_tools(case):
    (latin, _), (weather, _) = case("01-system-key", "thinking")
    assert latin.startswith("<|im_start|>system\nAnswer in Latin only.<|im_end|>\n<|im_start|>user\nGood morning!")
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"' in weather


def test_case_02_reasoning_is_read_under_its_other_names_and_its_loss_is_refused_or_counted(case, with_template):
    block = "<think>\nTwo and two make four.\n</think>\n\n4<|im_end|>"
    assert [taught for _, taught in case("02-reasoning-keys", "thinking")] == [[block], [block]]
    for problem in case("02-reasoning-keys", "xml_calls"):
        assert isinstance(problem, Problem)
        assert "leaves out the reasoning of 1 message to learn from (messages[1] (assistant))" in problem.reason
        assert 'lost_reasoning = "accept"' in problem.reason
    accepted = case("02-reasoning-keys", "xml_calls", lost_reasoning="accept")
    assert [taught for _, taught in accepted] == [["4<|im_end|>"], ["4<|im_end|>"]]
    recipe = Recipe(100, lost_reasoning="accept")
    report = validate_dataset(CASES / "02-reasoning-keys.jsonl", with_template("xml_calls"), recipe)
    (note,) = report.notes.values()
    assert "assistant messages whose reasoning the chat template leaves out" in report.notes
    assert str(note) == "2 in 2 conversations (line 1, 2)"


def test_case_03_train_and_trainable_switch_a_turn_off(case):
    for _, taught in case("03-train-flags", "chatml"):
        assert taught == ["GOOD<|im_end|>"]


@pytest.mark.parametrize("template", ["gen_no_eos", "gen_with_header"])
def test_case_04_generation_marks_that_lose_the_tool_call_with_the_template_are_refused(case, template):
    (problem,) = case("04-generation-marks", template)
    assert problem.reason.startswith("the chat template leaves out a part of messages[1] (assistant)")


def test_case_04_generation_marks_that_leave_out_calls_and_the_closing_token_are_not_followed(case, with_template):
    ((_, taught),) = case("04-generation-marks", "gen_content_only")
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Porto"}}</tool_call><|im_end|>'
    assert taught == [call, "18 C in Porto.<|im_end|>"]
    report = validate_dataset(CASES / "04-generation-marks.jsonl", with_template("gen_content_only"), Recipe(200))
    ((name, note),) = report.notes.items()
    assert "generation marks leave out a part" in name
    assert note.count == 2


def test_case_05_tools_that_the_template_has_no_place_for_are_refused(case):
    (problem,) = case("05-tools-left-out", "no_tools")
    assert problem.reason.startswith(
        "the chat template has no place for `tools` (the rendering does not name 'weather')"
    )
    ((text, _),) = case("05-tools-left-out", "xml_calls")
    assert "<name>weather</name>" in text


@pytest.mark.parametrize("template", ["thinking", "xml_calls"])
def test_case_06_nulls_of_other_tools_are_left_out_as_from_parquet(case, with_template, template, tmp_path):
    file = CASES / "06-nulls.jsonl"
    from_json = case("06-nulls", template)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = with_template(template)
    from_parquet = [encode(one, tokenizer) for one in read_conversations(tmp_path / "rows.parquet")]
    assert [text for text, _ in from_json] == [tokenizer.decode(one.ids) for one in from_parquet]
    assert not any(word in text for text, _ in from_json for word in ("null", "None"))
    notes = sum((one.notes for one in read_conversations(file)), Counter())
    assert notes == {"null arguments left out": 4, "nulls left out of `tools`": 3}


def test_case_07_data_of_which_truncation_leaves_nothing_are_named_with_length_and_policy(
    with_template, tmp_path, capsys
):
    file, tokenizer, recipe = CASES / "07-all-truncated.jsonl", with_template("thinking"), Recipe(256)
    report = validate_dataset(file, tokenizer, recipe)
    assert report.problems.total == 0
    assert print_report(report) == 1
    listed = capsys.readouterr().out
    with pytest.raises(UserError) as raised:
        prepare(file, tokenizer, recipe, cache_dir=tmp_path)
    assert str(raised.value) == f"{file}: " + next(
        line for line in listed.splitlines() if line.startswith("nothing is left")
    )
    longest = max(report.lengths)
    assert "sequence_length = 256" in str(raised.value)
    assert f"the longest has {longest:,} tokens" in str(raised.value)
    assert 'overlong = "truncate_right"' in str(raised.value)
    for remedy in (Recipe(longest), Recipe(256, overlong="truncate_left")):  # those it names
        prepare(file, tokenizer, remedy, cache_dir=tmp_path)


@pytest.mark.parametrize("template", ["thinking", "xml_calls"])
def test_case_09_calls_in_an_assistants_text_may_have_replies(case, template):
    ((text, taught),) = case("09-text-tool-calls", template)
    assert taught[0] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call><|im_end|>'
    assert "<tool_response>\n18 C\n</tool_response>" in text
    (conversation,) = read_conversations(CASES / "09-text-tool-calls.jsonl")
    assert isinstance(conversation, Conversation)
    assert not conversation.notes


def test_case_09_where_the_template_has_no_tool_replies_it_says_so(case):
    (problem,) = case("09-text-tool-calls", "instruction")
    assert problem.reason.endswith("use a template with tools, or write them as user messages")


def test_case_10_text_parts_are_joined_by_a_newline(case):
    ((text, _),) = case("10-text-parts", "chatml")
    assert "<|im_start|>user\n<env>cwd is /home/ana</env>\nFix the test.<|im_end|>" in text
