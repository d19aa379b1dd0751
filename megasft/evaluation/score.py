"""How right an answer is: exact match, and of tool calls whether they can be read, the tool and its arguments."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megasft.evaluation.tool_calls import Call, Reply


class Share(NamedTuple):
    """`right` of `all`; a mean of shares is the sum of `right` over the sum of `all`."""

    right: float
    all: float


Scores = dict[str, Share]


def score(reference: Reply, answer: Reply, cut_off: bool = False) -> Scores:
    """The scores of an answer (`config.measures.SCORES`); those about calls only where they apply.

    A call of the answer counts for one of the reference: calls of the same name are paired so that most arguments are
    right, in whatever order they come. A parameter that only one of the two has is a wrong argument, as is each of a
    call that is missing. Values are compared as JSON: 1 is 1.0, but not "1" and not true.
    """
    wanted = [call for call in reference.calls if call]
    readable = [call for call in answer.calls if call]
    pairs = _pairs(wanted, readable)
    all_right = len(readable) == len(answer.calls) == len(wanted) and all(
        other is not None and same(call.arguments, other.arguments) for call, other in zip(wanted, pairs, strict=True)
    )
    scores = {
        "exact_match": Share(all_right and answer.text == reference.text, 1),
        "cut_off": Share(cut_off, 1),
    }
    if not wanted:
        return scores | {"unasked_call": Share(bool(answer.calls), 1)}
    right, named = 0, 0
    for call, other in zip(wanted, pairs, strict=True):
        right += _same_arguments(call.arguments, other.arguments) if other else 0
        named += len(call.arguments.keys() | other.arguments.keys()) if other else len(call.arguments)
    return scores | {
        "call_parsable": Share(len(readable) == len(answer.calls) > 0, 1),
        "call_name": Share(sum(other is not None for other in pairs), len(wanted)),
        "call_arguments": Share(right, named),
        "call_match": Share(all_right, 1),
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def _same_arguments(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(key in other and same(value, other[key]) for key, value in one.items())


def _pairs(wanted: list[Call], found: list[Call]) -> list[Call | None]:
    """For each call of the reference one of the answer with its name, the pair with most in common first."""

    def in_common(pair: tuple[int, int]) -> tuple[int, int]:
        one, other = wanted[pair[0]].arguments, found[pair[1]].arguments
        right = _same_arguments(one, other)
        return -right, len(one.keys() | other.keys()) - right

    named = [(i, j) for i, one in enumerate(wanted) for j, other in enumerate(found) if one.name == other.name]
    pairs: dict[int, int] = {}
    for i, j in sorted(named, key=in_common):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return [found[pairs[i]] if i in pairs else None for i in range(len(wanted))]
