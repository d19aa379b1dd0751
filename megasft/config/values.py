"""Types and checks of single values in the run file."""

import datetime
import difflib
import json
import math
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

Recompute = Literal[True, False, "selective"]  # what is computed again for the backward: layers, nothing, their MLPs
REFERENCE_MODEL = "Qwen/Qwen3-Coder-30B-A3B-Instruct"


BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes' 4-bit types


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj")
ROUTER = "gate"
# What `all-linear` stands for: servers do not apply LoRA to a router (docs/adapters.md).
ALL_LINEAR = tuple(name for name in LINEAR_LAYERS if name != ROUTER)


def refuse_true(reason: str) -> AfterValidator:
    """A validator for a switch that must stay false; `reason` is the error."""

    def check(value: bool) -> bool:
        if value:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def target_modules(value: Any) -> Any:
    """Layer names, from a list or a comma-separated string: each once, in the order of LINEAR_LAYERS.

    `all-linear` stays as written, and so does the router beside it.
    """
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError('must be a list of names, such as ["all-linear"]')
    known = ("all-linear", *LINEAR_LAYERS)
    names = {name.strip() for name in value}
    if unknown := sorted(names.difference(known)):
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"{unknown[0]!r} is not a layer that takes LoRA; {hint}known: {', '.join(known)}")
    if not names:
        raise ValueError(f"names no layer; known: {', '.join(known)}")
    if "all-linear" in names:
        return ("all-linear", *names & {ROUTER})
    return tuple(name for name in LINEAR_LAYERS if name in names)


def short_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The shortest `target_modules` for these layers, sorted."""
    given = set(names)
    return tuple(sorted(given - set(ALL_LINEAR) | {"all-linear"} if given.issuperset(ALL_LINEAR) else given))


def check_deepspeed_stage(value: int | None) -> int | None:
    """Accept the ZeRO stages that megasft implements."""
    if value not in (None, 1, 2):
        reason = {
            0: "stage 0 keeps complete optimizer states on every rank, but megasft always shards them",
            3: "stage 3 shards the weights over data parallel, but megasft shards them by [data.topology]",
        }.get(value, "there is no such stage")
        raise ValueError(f"{reason}; set stage 1 or 2 (optimizer states sharded over data parallel)")
    return value


def check_recompute(value: Any) -> Any:
    """A bool or "selective"; a Literal takes 1 for true."""
    if not isinstance(value, bool) and value != "selective":
        raise ValueError('must be true, false or "selective"')
    return value


def check_block_size(value: int) -> int:
    """A block size of bitsandbytes' 4-bit types."""
    if value not in BLOCK_SIZES:
        raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))}")
    return value


def _tag(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if not isinstance(value, str | int | float) or value in (math.inf, -math.inf) or value != value:
        raise ValueError("a tag must be a string, a finite number, true or false")
    return value


def as_tuple(value: Any) -> Any:
    """Convert a list of tables to a tuple."""
    if not isinstance(value, list | tuple):
        raise ValueError('must be a list of tables, such as [{ path = "a.jsonl", weight = 0.5 }]')
    return tuple(value)


def list_as_tuple(value: Any) -> Any:
    """Convert a list to a tuple; leave anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def one_or_list_as_tuple(value: Any) -> Any:
    """Convert a list, or one text, to a tuple; leave anything else unchanged."""
    return (value,) if isinstance(value, str) else list_as_tuple(value)


def check_json(value: dict[str, Any]) -> dict[str, Any]:
    """Values that a chat template can be given: what JSON can say."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"holds a value that JSON has no form for ({error}); write dates as text") from None
    return value


def iso_date(value: Any) -> Any:
    """A date, or its text, such as "2026-01-31"."""
    if value is None or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("must be a date, such as 2026-01-31") from None


def names_as_tuple(value: Any) -> Any:
    """A list of names, or one name, as a tuple."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ValueError('must be a list of names, such as ["persona"]')
    return tuple(names)


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Count = Annotated[int, Field(ge=1, lt=2**31)]


Machines = Annotated[int, Field(ge=1, lt=2**15)]


Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]


Positive = Annotated[float, Field(gt=0)]


NotNegative = Annotated[float, Field(ge=0)]


BelowOne = Annotated[float, Field(ge=0, lt=1)]


TargetModules = Annotated[tuple[str, ...], BeforeValidator(target_modules)]


Tag = Annotated[str | int | float | bool, PlainValidator(_tag)]
