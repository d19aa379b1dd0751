"""Tool calls in answers are read as servers read them, and scored call by call and argument by argument."""

import math

import numpy as np
import pytest

from megasft.config.measures import SCORES
from megasft.evaluation.score import score
from megasft.evaluation.statistics import difference, ratio
from megasft.evaluation.tool_calls import Call, Reply, find_format, read_reply

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "on": {"type": "boolean"},
    "items": {"type": "array", "items": {"type": "string"}},
    "nested": {"type": "object"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}}]


def hermes(*blocks: str) -> str:
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)


def xml(name: str, **parameters: str) -> str:
    inner = "".join(f"\n<parameter={key}>\n{value}\n</parameter>" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>{inner}\n</function>\n</tool_call>"


F1 = Call("f", {"count": 1})
NESTED = '{"name": "f", "arguments": {"nested": {"a": [1, {"b": null}]}, "text": "x"}}'
HERMES = {
    "one": (hermes('{"name": "f", "arguments": {"count": 1}}'), "", [F1]),
    "text before": ("Let me see.\n" + hermes('{"name": "f", "arguments": {"count": 1}}'), "Let me see.", [F1]),
    "several": (hermes('{"name": "f", "arguments": {"count": 1}}', '{"name": "g", "arguments": {}}'), "", [F1, Call("g", {})]),
    "nested arguments": (hermes(NESTED), "", [Call("f", {"nested": {"a": [1, {"b": None}]}, "text": "x"})]),
    "not closed": ('<tool_call>\n{"name": "f", "arguments": {"count": 1}}', "", [F1]),
    "not JSON": (hermes("{'name': 'f'}"), "", [None]),
    "cut off": ('<tool_call>\n{"name": "f", "argum', "", [None]),
    "no arguments": (hermes('{"name": "f"}'), "", [None]),
    "arguments as text": (hermes('{"name": "f", "arguments": "{}"}'), "", [None]),
    "no name": (hermes('{"arguments": {}}'), "", [None]),
    "a name that is none": (hermes('{"name": 3, "arguments": {}}'), "", [None]),
    "a list": (hermes('[{"name": "f", "arguments": {}}]'), "", [None]),
    "two in a block": (hermes('{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}'), "", [None]),
    "a call in a call": (f"<tool_call>{hermes(NESTED)}</tool_call>", "", [None]),
    "one right, one wrong": (hermes('{"name": "f", "arguments": {"count": 1}}', "?"), "", [F1, None]),
    "no call": ("f is a function.", "f is a function.", []),
    "after reasoning": ("<think>\n<tool_call>hm\n</think>\n\n" + hermes('{"name": "f", "arguments": {"count": 1}}'), "", [F1]),
    "reasoning without an end": ("<think>\n" + hermes(NESTED), "", []),
    "an empty block": ("<tool_call></tool_call>", "", [None]),
    "the other format": (xml("f", count="1"), "", [None]),
}  # fmt: skip
XML = {
    "one": (xml("f", count="1"), "", [F1]),
    "text before": ("Let me see.\n\n" + xml("f", count="1"), "Let me see.", [F1]),
    "several": (xml("f", count="1") + "\n" + xml("g"), "", [F1, Call("g", {})]),
    "several in a block": ("<tool_call><function=f><parameter=count>1</parameter></function><function=g></function></tool_call>", "", [F1, Call("g", {})]),
    "without the block": ("So:\n<function=f>\n<parameter=count>\n1\n</parameter>\n</function>", "So:", [F1]),
    "nested arguments": (xml("f", nested='{"a": [1, {"b": null}]}', text="x"), "", [Call("f", {"nested": {"a": [1, {"b": None}]}, "text": "x"})]),
    "nested as Python writes it": (xml("f", nested="{'a': True}", items="['x']"), "", [Call("f", {"nested": {"a": True}, "items": ["x"]})]),
    "types": (xml("f", text="1", share="0.5", on="True", items='["a"]'), "", [Call("f", {"text": "1", "share": 0.5, "on": True, "items": ["a"]})]),
    "nothing": (xml("f", count="null", maybe="null", on="None", text="None"), "", [Call("f", {"count": None, "maybe": None, "on": None, "text": "None"})]),
    "one of two types": (xml("f", either="3"), "", [Call("f", {"either": 3})]),
    "the other of two types": (xml("f", either="three"), "", [Call("f", {"either": "three"})]),
    "not of the type": (xml("f", count="one", on="maybe", nested="{"), "", [Call("f", {"count": "one", "on": "maybe", "nested": "{"})]),
    "not in the schema": (xml("f", other="1"), "", [Call("f", {"other": "1"})]),
    "not one of the tools": (xml("h", other="1"), "", [Call("h", {"other": "1"})]),
    "lines and spaces stay": (xml("f", text="\n  a\n\n  b\n"), "", [Call("f", {"text": "\n  a\n\n  b\n"})]),
    "a parameter not closed": ("<tool_call><function=f><parameter=count>1<parameter=on>true</function></tool_call>", "", [Call("f", {"count": 1, "on": True})]),
    "nothing closed": ("<tool_call>\n<function=f>\n<parameter=count>\n1", "", [F1]),
    "a name not closed": ("<tool_call><function=f</function></tool_call>", "", [None]),
    "a parameter's name not closed": ("<tool_call><function=f><parameter=count</parameter></function></tool_call>", "", [None]),
    "no function": ("<tool_call>\nf(count=1)\n</tool_call>", "", [None]),
    "one right, one wrong": (xml("f", count="1") + "<tool_call>?</tool_call>", "", [F1, None]),
    "no call": ("f is a function.", "f is a function.", []),
    "the other format": (hermes(NESTED), "", [None]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("format", "case"), [*(("hermes", name) for name in HERMES), *(("xml", name) for name in XML)]
)  # fmt: skip
def test_calls_are_read_as_servers_read_them(format, case):
    answer, text, calls = (HERMES if format == "hermes" else XML)[case]
    found = read_reply(answer, format, TOOLS)
    assert found.text == text
    assert list(map(repr, found.calls)) == list(map(repr, calls))  # by type too: 1 is not true


@pytest.mark.parametrize(
    ("template", "format"), [("thinking", "hermes"), ("xml_calls", "xml"), ("chatml", None), ("no_tools", None)]
)
def test_the_format_is_the_templates_own(with_template, template, format):
    assert find_format(with_template(template)) == format
    assert read_reply(xml("f"), None).text == xml("f")


# --- scores ---


def shares(wanted: Reply, got: Reply, cut_off: bool = False) -> dict[str, tuple[float, float]]:
    found = score(wanted, got, cut_off)
    assert found.keys() <= SCORES.keys()
    return {name: tuple(share) for name, share in found.items() if name not in ("cut_off",)}


A, B = Call("a", {"x": 1, "y": "two"}), Call("b", {})
CASES = {
    "right": ([A], [Call("a", {"y": "two", "x": 1.0})], (1, 1), (1, 1), (2, 2), (1, 1)),
    "half the arguments": ([A], [Call("a", {"x": 1, "y": "2"})], (1, 1), (1, 1), (1, 2), (0, 1)),
    "true is not 1": ([A], [Call("a", {"x": True, "y": "two"})], (1, 1), (1, 1), (1, 2), (0, 1)),
    "a text is not a number": ([A], [Call("a", {"x": "1", "y": "two"})], (1, 1), (1, 1), (1, 2), (0, 1)),
    "one argument too many": ([A], [Call("a", {"x": 1, "y": "two", "z": None})], (1, 1), (1, 1), (2, 3), (0, 1)),
    "one argument missing": ([A], [Call("a", {"x": 1})], (1, 1), (1, 1), (1, 2), (0, 1)),
    "another tool": ([A], [Call("c", A.arguments)], (1, 1), (0, 1), (0, 2), (0, 1)),
    "no call": ([A], [], (0, 1), (0, 1), (0, 2), (0, 1)),
    "malformed": ([A], [None], (0, 1), (0, 1), (0, 2), (0, 1)),
    "right, and a malformed one": ([A], [A, None], (0, 1), (1, 1), (2, 2), (0, 1)),
    "one of two": ([A, B], [B], (1, 1), (1, 2), (0, 2), (0, 1)),
    "in another order": ([A, B], [B, A], (1, 1), (2, 2), (2, 2), (1, 1)),
    "twice": ([A], [A, A], (1, 1), (1, 1), (2, 2), (0, 1)),
    "the same tool twice, in another order": (
        [A, Call("a", {"x": 2})], [Call("a", {"x": 2}), A], (1, 1), (2, 2), (3, 3), (1, 1),
    ),
    "without arguments": ([B], [B], (1, 1), (1, 1), (0, 0), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_calls_are_scored_by_name_and_argument(case):
    wanted, got, parsable, name, arguments, match = CASES[case]
    expected = {"call_parsable": parsable, "call_name": name, "call_arguments": arguments, "call_match": match}
    found = shares(Reply("", tuple(wanted)), Reply("", tuple(got)))
    assert found.pop("exact_match") == match
    assert found == expected


def test_an_answer_is_right_as_a_whole_or_not():
    assert shares(Reply("a"), Reply("a")) == {"exact_match": (1, 1), "unasked_call": (0, 1)}
    assert shares(Reply("a"), Reply("A")) == {"exact_match": (0, 1), "unasked_call": (0, 1)}
    assert shares(Reply("a"), Reply("a", (None,))) == {"exact_match": (0, 1), "unasked_call": (1, 1)}
    assert shares(Reply("a", (A,)), Reply("b", (A,)))["exact_match"] == (0, 1)
    assert shares(Reply("a", (A,)), Reply("b", (A,)))["call_match"] == (1, 1)
    assert score(Reply("a"), Reply("a"), True)["cut_off"] == (1, 1)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [({"a": [1, 2]}, {"a": [1.0, 2]}, True), ([1, 2], [2, 1], False), (None, False, False), (0, False, False),
     ({"a": None}, {}, False), ("1", 1, False), ([], {}, False), (10**20, 1e20, True)],
)  # fmt: skip
def test_values_are_compared_as_json(one, other, equal):
    arguments = [Reply("", (Call("a", {"x": value}),)) for value in (one, other)]
    assert shares(*arguments)["call_match"] == (equal, 1)


# --- statistics ---


def test_the_interval_is_paired_and_has_its_level():
    generator = np.random.default_rng(1)
    inside, widths, unpaired = 0, [], []
    for _ in range(100):
        hard = generator.normal(2, 1, 60)  # some conversations are hard for both
        tokens = generator.integers(1, 50, 60)
        base = np.stack([hard * tokens, tokens], 1)
        adapter = np.stack([(hard - 0.5 + generator.normal(0, 0.3, 60)) * tokens, tokens], 1)
        found = difference(base, adapter)
        assert found.value == pytest.approx(ratio(adapter) - ratio(base))
        inside += found.low <= -0.5 <= found.high
        widths.append(found.high - found.low)
        other = difference(base, adapter[generator.permutation(60)])
        unpaired.append(other.high - other.low)
    # 95 expected, with a standard deviation of 2.2; the percentile interval of 60 conversations is a little narrow.
    assert inside >= 86
    assert np.mean(unpaired) > 2 * np.mean(widths)
    assert difference(base, adapter) == found, "the seed is fixed"


def test_nothing_to_average_is_not_a_number():
    none = np.zeros((3, 2))
    assert math.isnan(ratio(none))
    assert math.isnan(difference(none, none).low)
    one = np.array([[1.0, 2.0]])
    assert difference(one, 2 * one / [1, 2]).value == 0.5
    assert math.isnan(difference(one, one).low), "one conversation says nothing about others"
    many = np.array([[math.log(2.0), 1.0]] * 4)
    assert difference(many, 2 * many / [1, 2], exponential=True).value == pytest.approx(4 - 2)
