"""What values of a record may be: text that can be encoded, and trees of what JSON can say."""

import math
from typing import Any

from megasft.data.problems import WrongError
from megasft.data.records import MAX_DEPTH, too_deep


def check_text(value: Any, where: str) -> str:
    """`value`, which must be text that UTF-8 and tokenizers can take. Raises WrongError."""
    if not isinstance(value, str):
        raise WrongError(f"{where} is not text", value)
    if "\0" in value:
        raise WrongError(f"{where} holds a NUL character", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WrongError(f"{where} holds half of a surrogate pair", value[error.start :]) from None
    return value


def check_tree(value: Any, where: str) -> None:
    """Check that `value` is made of what JSON can say, and nothing of it is deeper than `MAX_DEPTH`."""
    if too_deep(value):
        raise WrongError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if isinstance(current, dict):
            open_values += [*current.keys(), *current.values()]
        elif isinstance(current, list):
            open_values += current
        elif isinstance(current, str):
            check_text(current, where)
        elif isinstance(current, float) and not math.isfinite(current):
            raise WrongError(f"{where} holds a number too large for JSON readers")
        elif not isinstance(current, bool | int | float | None):
            raise WrongError(f"{where} holds a {type(current).__name__}, which JSON has no form for", current)
