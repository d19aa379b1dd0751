"""Hermes function calling: tools in the system prompt, calls and results as marked text.

    system     ... <tools>[{"type": "function", ...}]</tools> ...
    assistant  some text <tool_call>{"name": .., "arguments": ..}</tool_call>
    tool/user  <tool_response>...</tool_response>

They become `tools`, `tool_calls` and messages of the role tool, which each model's chat template then writes in its own
way. The rest of the system prompt stays as it is.
"""

import ast
import re
from typing import Any

from megasft.data.formats.shape import Changes, Message, Record, WrongShapeError, function_call
from megasft.data.json_text import parse_value, too_deep

TOOLS = re.compile(r"<tools>((?:(?!<tools>).)*?)</tools>", re.DOTALL)
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
MAX_LITERAL_CHARS = 2**20


def read_hermes(record: Record, changes: Changes) -> Record:
    """`record`, whose messages are already such, with everything that Hermes writes as text in its structured form."""
    return structure(record, changes, only_with_tools=False)


def structure(record: Record, changes: Changes, only_with_tools: bool) -> Record:
    """As `read_hermes`; with `only_with_tools`, a record without tools in its system prompt stays as it is."""
    messages = [dict(message) if isinstance(message, dict) else message for message in record["messages"]]
    tools = _take_tools(messages, record.get("tools"), changes)
    if only_with_tools and not tools:
        return record
    structured: list[Any] = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        content, role = (content, message.get("role")) if isinstance(content, str) else ("", None)
        if role == "assistant" and "<tool_call>" in content:
            structured.append(_with_calls(message, f"messages[{i}]", changes))
        elif role in ("tool", "user") and "<tool_response>" in content:
            structured += _results(message, changes)
        else:
            structured.append(message)
    return {**record, "messages": structured} | ({"tools": tools} if tools and not record.get("tools") else {})


def parse_loosely(text: str) -> Any:
    """The value in `text`: JSON, one or several behind each other, or Python's way of writing it; None if neither."""
    text = text.strip()
    value, reason = parse_value(text)
    if not reason:
        return value
    lines = [line for line in text.splitlines() if line.strip()]
    values = [parse_value(line) for line in lines]
    if len(lines) > 1 and not any(reason for _, reason in values):
        return [value for value, _ in values]
    if len(text) > MAX_LITERAL_CHARS:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict | list) and _is_json(value) else None


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return not too_deep(value) and all(isinstance(key, str) for key in value) and all(map(_is_json, value.values()))
    return all(map(_is_json, value)) if isinstance(value, list) else isinstance(value, str | int | float | bool | None)


def _take_tools(messages: list[Any], given: Any, changes: Changes) -> list[dict[str, Any]]:
    """Take the tools out of the system prompt."""
    system = messages[0] if messages and isinstance(messages[0], dict) else {}
    content = system.get("content")
    if system.get("role") != "system" or not isinstance(content, str):
        return []
    for match in TOOLS.finditer(content):
        tools = parse_loosely(match[1])
        tools = [tools] if isinstance(tools, dict) else tools
        if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
            known = parse_loosely(given) if isinstance(given, str) else given
            if known and not (isinstance(known, list) and all(tool in known for tool in tools)):
                raise WrongShapeError(
                    "the tools in the system prompt differ from those in `tools`; keep one of the two"
                )
            before, after = content[: match.start()].rstrip(), content[match.end() :].lstrip()
            system["content"] = "\n".join(part for part in (before, after) if part)
            if not system["content"] and set(system) == {"role", "content"}:
                del messages[0]
            changes.note("tools in the system prompt became `tools`; the rest of the prompt stayed")
            return tools
    return []


def _with_calls(message: Message, where: str, changes: Changes) -> Message:
    content, calls, end = message["content"], list(message.get("tool_calls") or ()), 0
    begin = content.index("<tool_call>")
    for match in CALL.finditer(content):
        if end and content[end : match.start()].strip():
            raise WrongShapeError(f"{where}: text behind a tool call; chat templates write it before the calls")
        call = parse_loosely(match[1])
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or set(call) - {"name", "arguments"}:
            raise WrongShapeError(f'{where}: in <tool_call> is no {{"name": .., "arguments": ..}}')
        calls.append(function_call(call["name"], call.get("arguments")))
        end = match.end()
    if content[end:].strip():
        raise WrongShapeError(f"{where}: text behind a tool call, or a <tool_call> without its end")
    changes.note("<tool_call> in an assistant's text became `tool_calls`")
    return {**message, "content": content[:begin].rstrip(), "tool_calls": calls}


def _results(message: Message, changes: Changes) -> list[Message]:
    """A message for each <tool_response>, if there is nothing else in it."""
    if RESPONSE.sub("", message["content"]).strip():
        return [message]
    changes.note("<tool_response> became messages of the role tool")
    return [
        {**message, "role": "tool", "content": match[1].strip("\r\n")}
        for match in RESPONSE.finditer(message["content"])
    ]
