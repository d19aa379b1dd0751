"""What the readers of all formats share: how a record is refused, what was changed, lists that hide in JSON text."""

from typing import Any

from megasft.data.json_text import parse_value

Record = dict[str, Any]
Message = dict[str, Any]


class WrongShapeError(Exception):
    """The record is not what its format says it is; the text says where and what would be right."""


class Changes(list[str]):
    """What was done to a record beyond naming its parts anew: a line for each kind of change."""

    def note(self, change: str) -> None:
        """Remember `change`, once."""
        if change not in self:
            self.append(change)


def read_list(value: Any, where: str, changes: Changes) -> list[Any]:
    """The list that `value` is: as it stands, as JSON text, or turned inside out (`{"role": [..], "content": [..]}`).

    Raises:
        WrongShapeError: it is none of these.
    """
    if isinstance(value, str):
        value, reason = parse_value(value)
        if reason:
            raise WrongShapeError(f"`{where}` is text, and {reason}")
        changes.note(f"`{where}` read from JSON text")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise WrongShapeError(f"`{where}` is an object of lists that differ in length")
        names = list(value)
        value = [dict(zip(names, row, strict=True)) for row in zip(*value.values(), strict=True)]
        changes.note(f"`{where}` read from an object of lists")
    if not isinstance(value, list):
        raise WrongShapeError(f"`{where}` is not a list")
    return value


def read_text(value: Any, where: str) -> str:
    """`value` if it is text, "" for null.

    Raises:
        WrongShapeError: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongShapeError(f"`{where}` is not text")
    return value


def without(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    """`found` without some of its keys."""
    return {key: value for key, value in found.items() if key not in keys}


def with_system(record: Record, changes: Changes) -> Record:
    """`record` with its system prompt as the first message; one that is no text, or a second one, stays where it is."""
    for key in ("system", "system_prompt"):
        system, messages = record.get(key), record["messages"]
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if isinstance(system, str) and (not system.strip() or first.get("role") != "system"):
            record = without(record, key)
            if system.strip():
                record["messages"] = [{"role": "system", "content": system}, *messages]
                changes.note(f"`{key}` became the first message")
    return record


def function_call(name: Any, arguments: Any, id: Any = None) -> dict[str, Any]:
    """A tool call in the form of OpenAI's `tool_calls`."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id is None else call | {"id": id}
