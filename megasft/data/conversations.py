"""Conversations, read one at a time from JSONL (plain, .gz, .zst) and Parquet files, or a folder of them.

A record is an object with `messages` and, where there are any, `tools`; every other key of it is ignored, and so are
the keys of a message that no template reads. What comes out is what chat templates understand: text parts joined,
`arguments` as an object, flat tool calls in their nested form. Nothing is guessed: a record that is not right in every
point becomes a `Problem` that names file, line and reason, and reading goes on behind it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasft.data.records import MAX_DEPTH, conversation_files, parse_object, read_records, too_deep, visible


@dataclass(slots=True)
class Conversation:
    """One checked conversation. `supervised[i]` says whether message i may be trained on; only assistant messages may.

    `line` counts from 1: the line of a JSONL file, the row of a Parquet file.
    """

    messages: list[dict[str, Any]]
    supervised: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one record cannot be used. `excerpt` is safe to print."""

    file: str
    line: int
    reason: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" + (f" | {self.excerpt}" if self.excerpt else "")


@dataclass
class Problems:
    """Counts every problem and keeps the first `limit` to show."""

    limit: int = 20
    total: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Count `problem`, and keep it if there is room."""
        self.total += 1
        if len(self.first) < self.limit:
            self.first.append(problem)

    def lines(self) -> list[str]:
        """The kept problems, one line each, and how many more there are."""
        more = self.total - len(self.first)
        return [*map(str, self.first), *([f"... and {more} more"] if more else [])]


def read_conversations(path: str | Path) -> Iterator[Conversation | Problem]:
    """Yield every record of a file, or of a folder's files in sorted order, as a `Conversation` or a `Problem`.

    Holds one line (64 MiB at most) or one small batch of Parquet rows in memory. A file without any record is a
    `Problem`.

    Raises:
        UserError: `path` is missing, unreadable, or holds no file of a known kind.
    """
    for file in conversation_files(path):
        empty = True
        for line, record, begin in read_records(file):
            empty = False
            yield check_record(record, str(file), line, begin)
        if empty:
            yield Problem(str(file), 1, "the file holds no conversation")


def check_record(record: dict[str, Any] | str, file: str, line: int, begin: bytes = b"") -> Conversation | Problem:
    """The conversation that a record stands for; a `str` says why there is none. `begin` are its first bytes."""
    try:
        if isinstance(record, str):
            raise _WrongError(record)
        return _conversation(record, file, line)
    except _WrongError as wrong:
        excerpt = wrong.excerpt or visible(begin.decode("utf-8", "replace").strip())
        return Problem(file, line, wrong.reason, excerpt)


# --- checks ----------------------------------------------------------------------------------------------------------


class _WrongError(Exception):
    def __init__(self, reason: str, culprit: Any = None):
        self.reason = reason
        self.excerpt = "" if culprit is None else visible(culprit if isinstance(culprit, str) else repr(culprit))


def _conversation(record: dict[str, Any], file: str, line: int) -> Conversation:
    raw = record.get("messages")
    if not isinstance(raw, list) or not raw:
        raise _WrongError("`messages` is missing or empty" if not raw else "`messages` is not a list")
    messages: list[dict[str, Any]] = []
    supervised: list[bool] = []
    owed = 0  # tool replies that the last assistant turn still waits for
    for i, message in enumerate(raw):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _WrongError(f"{where} is not an object", message)
        checked = _message(message, where)
        role = checked["role"]
        if role == "system" and i > 0:
            raise _WrongError(f"{where}: a system message can only come first", message)
        if role == "tool" and owed == 0:
            raise _WrongError(f"{where}: this tool reply answers no tool call", message)
        owed = len(checked.get("tool_calls", ())) if role == "assistant" else owed - 1 if role == "tool" else 0
        trained = _supervised(message, role, where)
        if trained and not any(before["role"] == "user" for before in messages):
            raise _WrongError(f"{where}: an assistant message to learn from needs a user message before it", message)
        if trained and not (checked["content"].strip() or "tool_calls" in checked):
            raise _WrongError(f"{where}: the assistant says nothing", message)
        messages.append(checked)
        supervised.append(trained)
    if not any(supervised):
        raise _WrongError("nothing to learn from: no assistant message with `loss` on")
    return Conversation(messages, tuple(supervised), _tools(record.get("tools")), file, line)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise _WrongError(f"{where}: the role is not one of system, user, assistant, tool", message)
    calls = message.get("tool_calls")
    checked: dict[str, Any] = {"role": role, "content": _content(message, bool(calls), where)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if (value := message.get(key)) is not None:
            checked[key] = _text(value, f"{where}.{key}")
    if message.get("function_call"):
        raise _WrongError(f"{where}: `function_call` is the old form; write `tool_calls`", message)
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise _WrongError(f"{where}: `tool_calls` is a list and belongs to an assistant message", message)
        checked["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
    return checked


def _content(message: dict[str, Any], has_calls: bool, where: str) -> str:
    content = message.get("content")
    if content is None:
        if not (has_calls and message["role"] == "assistant"):
            raise _WrongError(f"{where}: `content` may only be missing or null beside `tool_calls`", message)
        return ""
    if not isinstance(content, list):
        return _text(content, f"{where}.content")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise _WrongError(f"{where}: only text parts can be read", part)
    return _text("".join(part["text"] for part in content), f"{where}.content")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """The nested form, with the arguments as an object: what every template in use can render."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") not in ("function", None):
        raise _WrongError(f"{where} is not a function call", call)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise _WrongError(f"{where}: the function has no name", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        parsed = parse_object(_text(arguments, f"{where}.arguments").encode())
        if isinstance(parsed, str):
            raise _WrongError(f"{where}: `arguments` is {parsed}", arguments)
        arguments = parsed
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, dict):
        raise _WrongError(f"{where}: `arguments` is not an object", call)
    _check_tree(arguments, f"{where}.arguments")
    nested = {"type": "function", "function": {"name": _text(function["name"], where), "arguments": arguments}}
    if call.get("id") is not None:
        nested["id"] = _text(call["id"], f"{where}.id")
    return nested


def _supervised(message: dict[str, Any], role: str, where: str) -> bool:
    loss, weight = message.get("loss"), message.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise _WrongError(f"{where}: `loss` is not true or false", message)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _WrongError(f"{where}: `weight` can be 0 or 1; other weights are not supported", message)
    if loss is not None and weight is not None and loss != bool(weight):
        raise _WrongError(f"{where}: `loss` and `weight` contradict each other", message)
    if role != "assistant":
        if loss or weight:
            raise _WrongError(f"{where}: only assistant messages can be learned from", message)
        return False
    return loss is not False and weight != 0


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        parsed = parse_object(b'{"tools": ' + _text(tools, "tools").encode() + b"}")
        if isinstance(parsed, str):
            raise _WrongError(f"`tools` is {parsed}", tools)
        tools = parsed["tools"]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _WrongError("`tools` is not a list of objects", tools)
    _check_tree(tools, "tools")
    return tools


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{where} is not text", value)
    if "\0" in value:
        raise _WrongError(f"{where} holds a NUL character", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _WrongError(f"{where} holds half of a surrogate pair", value[error.start :]) from None
    return value


def _check_tree(value: Any, where: str) -> None:
    """Check that `value` is made of what JSON can say, and nothing of it is deeper than `MAX_DEPTH`."""
    if too_deep(value):
        raise _WrongError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if isinstance(current, dict):
            open_values += [*current.keys(), *current.values()]
        elif isinstance(current, list):
            open_values += current
        elif isinstance(current, str):
            _text(current, where)
        elif isinstance(current, float) and not math.isfinite(current):
            raise _WrongError(f"{where} holds a number too large for JSON readers")
        elif not isinstance(current, bool | int | float | None):
            raise _WrongError(f"{where} holds a {type(current).__name__}, which JSON has no form for", current)
