"""Nothing that a record says is lost on the way to `messages`, however it is damaged."""

import json
import random
import re

from megasft.data.formats import Changes, recognize, to_messages
from tests.unit.records_by_format import RIGHT


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
