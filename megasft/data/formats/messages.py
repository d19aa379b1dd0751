"""`messages` in forms that are more than a list of messages with text: content parts with tools, JSON text."""

from typing import Any

from megasft.data.formats.parts import has_parts, read_tools, split_parts
from megasft.data.formats.shape import Changes, Message, Record, WrongShapeError, read_list
from megasft.data.json_text import parse_value


def read_messages(record: Record, changes: Changes) -> Record:
    """`record` with `messages` as a list of messages with `role` and `content`, and tools in `tools`."""
    raw = record.get("messages")
    if raw and not (isinstance(raw, list) and not any(map(_is_foreign, raw))):
        messages = [
            new
            for i, message in enumerate(read_list(raw, "messages", changes))
            for new in read_message(message, f"messages[{i}]", changes)
        ]
        record = {**record, "messages": messages}
    return read_tools(record, changes)


def read_message(message: Any, where: str, changes: Changes) -> list[Message]:
    """The messages that one stands for: more than one where it holds tool results."""
    if isinstance(message, str):
        message, reason = parse_value(message)
        if reason:
            raise WrongShapeError(f"{where} is text, and {reason}")
        changes.note("messages read from JSON text")
    if not isinstance(message, dict):
        raise WrongShapeError(f"{where} is not an object")
    return split_parts(message, where, changes) if has_parts(message) else [message]


def _is_foreign(message: Any) -> bool:
    return message.lstrip()[:1] == "{" if isinstance(message, str) else isinstance(message, dict) and has_parts(message)
