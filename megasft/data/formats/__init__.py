"""The forms in which people keep conversations, and how a record of each becomes one with `messages` and `tools`.

A reader moves what it knows and leaves every other key where it is: `conversations` reads or refuses those. So nothing
that a record says is lost here. The first record of a file decides its format; a record of another one is refused.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from megasft.data.formats import messages, pairs, parts, shape, sharegpt, text_calls
from megasft.data.formats.shape import Changes, Record, WrongShapeError

MODULES = (sys.modules[__name__], messages, pairs, parts, shape, sharegpt, text_calls)
"""Everything that decides what a record becomes, for the key of the cache of tokens."""


@dataclass(frozen=True)
class Format:
    """One form of records.

    Attributes:
        title: what to call it, and by what it is recognized.
        matches: whether a record is of this form.
        read: gives the record with `messages`; raises WrongShapeError where it cannot.
    """

    title: str
    matches: Callable[[Record], bool]
    read: Callable[[Record, Changes], Record]


PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output")


def _never(_: Record) -> bool:
    return False


def _refuse(reason: str) -> Callable[[Record, Changes], Record]:
    def refuse(record: Record, changes: Changes) -> Record:
        raise WrongShapeError(reason)

    return refuse


def _has_both(record: Record) -> bool:
    return record.get("messages") is not None and any(record.get(key) is not None for key in sharegpt.KEYS)


def _hermes(record: Record, changes: Changes) -> Record:
    shaped = sharegpt.read_sharegpt if record.get("messages") is None else messages.read_messages
    return text_calls.read_hermes(shaped(record, changes), changes)


# In the order of recognition.
FORMATS = {
    "preferences": Format(
        "preference pairs",
        lambda record: record.get("messages") is None and any(key in record for key in PREFERENCES),
        _refuse(
            "preference data (DPO: a chosen and a rejected answer); megasft trains on answers, not on preferences: "
            "keep the chosen one as `completion` beside `prompt`, or as `messages`"
        ),
    ),
    "both": Format(
        "`messages` and `conversations`",
        _has_both,
        _refuse(
            "both `messages` and `conversations` are given; say which to read: "
            "megasft convert IN OUT --format messages, or sharegpt"
        ),
    ),
    "messages": Format(
        "messages (`messages`)", lambda record: record.get("messages") is not None, messages.read_messages
    ),
    "sharegpt": Format(
        "ShareGPT (`conversations`)",
        lambda record: any(record.get(key) is not None for key in sharegpt.KEYS),
        sharegpt.read_sharegpt,
    ),
    "traces": Format(
        "agent traces (`dialogue`, `assistant`)",
        lambda record: "dialogue" in record and "assistant" in record,
        pairs.read_trace,
    ),
    "alpaca": Format(
        "Alpaca (`instruction`, `input`, `output`)",
        lambda record: pairs.is_pair(record) and record.get("instruction") is not None,
        pairs.read_pair,
    ),
    "pairs": Format("pairs of a prompt and its answer", pairs.is_pair, pairs.read_pair),
    "message": Format(
        "messages without a conversation",
        lambda record: isinstance(record.get("role"), str) and "content" in record,
        _refuse('a message, not a conversation; write {"messages": [...]} with all of its messages'),
    ),
    "text": Format(
        "plain text (`text`)",
        lambda record: isinstance(record.get("text"), str),
        _refuse("plain text without an answer to learn from; megasft trains on conversations"),
    ),
    "hermes": Format("Hermes function calling (<tool_call> in text)", _never, _hermes),
}
# Keys that a record with `messages` cannot keep: it would not be clear which to read.
CLAIMING = sharegpt.KEYS
# At least one of these is in every record of a known format.
KNOWN_KEYS = {"messages", "dialogue", "role", "text", *PREFERENCES, *CLAIMING, *pairs.PROMPTS}
# What can be asked for by name. The second names are what those files are called elsewhere.
NAMES = {name: name for name in ("messages", "sharegpt", "alpaca", "pairs", "traces", "hermes")}
NAMES |= {"openai": "messages", "bedrock": "messages", "anthropic": "messages"}


def recognize(record: Record) -> str:
    """The format of a record; "" if it is of none."""
    return next((name for name, format in FORMATS.items() if format.matches(record)), "")


def to_messages(record: Record, format: str, changes: Changes | None = None, train_on: str = "last") -> Record | str:
    """The record with `messages`, or the reason why that cannot be.

    Args:
        format: one of FORMATS; or A+B/C, for a prompt in the columns A and B and an answer in C.
        changes: gets what was done to the record.
        train_on: for traces: `last` trains on their answer only, `all` on earlier assistant messages too.
    """
    changes = Changes() if changes is None else changes
    try:
        if "/" in format:
            prompts, _, answer = format.partition("/")
            missing = [key for key in (*prompts.split("+"), answer) if key not in record]
            if missing:
                raise WrongShapeError(f"the column `{missing[0]}` is missing")
            return pairs.read_columns(record, prompts.split("+"), answer, changes)
        if format == "traces":
            return pairs.read_trace(record, changes, train_on)
        found = recognize(record)
        if found not in (format, "") and format != "hermes" and not FORMATS[format].matches(record):
            raise WrongShapeError(f"this looks like {FORMATS[found].title}; the file began as {FORMATS[format].title}")
        return FORMATS[format].read(record, changes)
    except WrongShapeError as wrong:
        return str(wrong)
