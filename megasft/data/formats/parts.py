"""Content parts that carry more than text: Amazon Bedrock's Converse form, and Anthropic's.

    Bedrock    {"text": ..}  {"toolUse": {toolUseId, name, input}}  {"toolResult": {toolUseId, content, status}}
               {"reasoningContent": {"reasoningText": {text, signature}}}
    Anthropic  {"type": "text", ..}  {"type": "tool_use", id, name, input}
               {"type": "tool_result", tool_use_id, content, is_error}  {"type": "thinking", thinking, signature}

Calls become `tool_calls` and results messages of the role tool; what else such a part says (`status`, `is_error`) is
kept as a key of the message. Text and reasoning stay parts, which `conversations` reads, in Anthropic's form.
"""

import json
import re
from typing import Any

from megasft.data.formats.shape import Changes, Message, Record, WrongShapeError, function_call, without

BEDROCK = ("text", "toolUse", "toolResult", "reasoningContent")
SCHEMA = re.compile(r"bedrock-conversation-\d{4}")
OWN_MEANING = ("role", "content", "tool_calls", "tool_call_id")


def has_parts(message: Message) -> bool:
    """Whether a message's content holds parts that have to be rewritten."""
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, dict) and (part.get("type") in ("tool_use", "tool_result") or any(map(part.get, BEDROCK[1:])))
        for part in content
    )


def split_parts(message: Message, where: str, changes: Changes) -> list[Message]:
    """The messages that one with parts stands for: itself, and one for each tool result, in their order."""
    rest = without(message, "content")
    messages: list[Message] = []
    for j, part in enumerate(message["content"]):
        here = f"{where}.content[{j}]"
        kind, body, extras = _part(part, here)
        if kind == "result":
            if message.get("role") not in ("user", "tool"):
                raise WrongShapeError(f"{here}: a tool result belongs into a message of the role user")
            changes.note("tool results in content parts became messages of the role tool")
            messages.append(_result(body, extras, here))
            continue
        if not messages or messages[-1].get("role") == "tool":
            messages.append({**rest, "content": []})
        open_message = messages[-1]
        if kind == "call":
            changes.note("tool calls in content parts became `tool_calls`")
            open_message["tool_calls"] = [*(open_message.get("tool_calls") or []), body]
            _keep(open_message, extras, here)
        elif not open_message.get("tool_calls"):
            open_message["content"].append(body)
        elif kind != "text" or body["text"].strip():
            raise WrongShapeError(f"{here}: {kind} behind a tool call; chat templates write it before the calls")
    if all(one.get("role") == "tool" for one in messages):
        _keep(messages[0], without(rest, "role"), where)
    return [{**one, "content": _plain(one["content"])} for one in messages]


def read_tools(record: Record, changes: Changes) -> Record:
    """`record` with Bedrock's `toolConfig`, or a list of its `toolSpec`, as `tools` in the form of OpenAI."""
    if isinstance(version := record.get("schemaVersion"), str) and SCHEMA.fullmatch(version):
        record = without(record, "schemaVersion")  # the name of the format
    config = record.get("toolConfig")
    if isinstance(config, dict) and isinstance(config.get("tools"), list) and not record.get("tools"):
        rest = without(config, "tools", "toolChoice")
        record = without(record, "toolConfig") | {"tools": config["tools"]} | ({"toolConfig": rest} if rest else {})
        if config.get("toolChoice") is not None:
            if "tool_choice" in record:
                raise WrongShapeError("`tool_choice` and Bedrock's `toolChoice` are both given")
            record["tool_choice"] = config["toolChoice"]
    tools = record.get("tools")
    if isinstance(tools, list) and any(isinstance(tool, dict) and "toolSpec" in tool for tool in tools):
        changes.note("`toolSpec` written in the form of OpenAI's tools")
        record = {**record, "tools": list(map(_tool, tools))}
    return record


# --- parts -----------------------------------------------------------------------------------------------------------


def _part(part: Any, where: str) -> tuple[str, Any, dict[str, Any]]:
    """(text, reasoning, call or result; what it becomes; its other keys)."""
    if isinstance(part, str):
        return "text", {"type": "text", "text": part}, {}
    if not isinstance(part, dict):
        raise WrongShapeError(f"{where} is not an object")
    part = {key: value for key, value in part.items() if value is not None}
    known = [key for key in BEDROCK if key in part]
    kind = part.get("type")
    if kind is None and len(known) == 1:
        return _bedrock(known[0], part[known[0]], without(part, known[0]), where)
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part, {}
    if kind == "thinking":
        return "reasoning", part, {}
    if kind == "tool_use":
        call = function_call(part.get("name"), part.get("input"), part.get("id"))
        return "call", call, without(part, "type", "name", "input", "id")
    if kind == "tool_result":
        result = part.get("tool_use_id"), part.get("content")
        return "result", result, without(part, "type", "tool_use_id", "content")
    name = kind or ", ".join(part) or "an empty object"
    raise WrongShapeError(f"{where}: a part of the kind `{name}` cannot be read; only text and tool calls can")


def _bedrock(key: str, body: Any, extras: dict[str, Any], where: str) -> tuple[str, Any, dict[str, Any]]:
    if key == "text" and isinstance(body, str):
        return "text", {"type": "text", "text": body, **extras}, {}
    if not isinstance(body, dict):
        raise WrongShapeError(f"{where}: `{key}` is not what Bedrock writes there")
    body = {name: value for name, value in body.items() if value is not None}
    if clash := next((name for name in extras if name in body), ""):
        raise WrongShapeError(f"{where}: `{clash}` stands in the part and beside it")
    if key == "toolUse":
        call = function_call(body.get("name"), body.get("input"), body.get("toolUseId"))
        return "call", call, extras | without(body, "name", "input", "toolUseId")
    if key == "toolResult":
        return "result", (body.get("toolUseId"), body.get("content")), extras | without(body, "toolUseId", "content")
    thought = body.get("reasoningText")
    if not isinstance(thought, dict) or not isinstance(thought.get("text"), str):
        raise WrongShapeError(f"{where}: reasoning without its text cannot be trained on")
    others = extras | without(body, "reasoningText") | without(thought, "text")
    return "reasoning", {"type": "thinking", "thinking": thought["text"], **without(others, "type")}, {}


def _result(body: tuple[Any, Any], extras: dict[str, Any], where: str) -> Message:
    id, content = body
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts = []
    for k, part in enumerate(parts):
        if isinstance(part, dict) and set(part) == {"json"}:
            texts.append({"type": "text", "text": json.dumps(part["json"], ensure_ascii=False)})
            continue
        kind, text, _ = _part(part, f"{where}.content[{k}]")
        if kind != "text":
            raise WrongShapeError(f"{where}.content[{k}]: a tool result can hold text or JSON, not a {kind}")
        texts.append(text)
    message: Message = {"role": "tool", "content": texts} | ({} if id is None else {"tool_call_id": id})
    _keep(message, extras, where)
    return message


def _plain(parts: list[Any]) -> Any:
    """One part of nothing but text as that text."""
    if len(parts) == 1 and set(parts[0]) == {"type", "text"}:
        return parts[0]["text"]
    return parts or ""


def _keep(message: Message, extras: dict[str, Any], where: str) -> None:
    for key, value in extras.items():
        if key in OWN_MEANING or message.get(key, value) != value:
            raise WrongShapeError(f"{where}: the key `{key}` of this part has no place in a message")
        message[key] = value


def _tool(tool: Any) -> Any:
    spec = tool.get("toolSpec") if isinstance(tool, dict) else None
    if not isinstance(spec, dict):
        return tool
    schema = spec.get("inputSchema")
    if isinstance(schema, dict) and set(schema) == {"json"}:
        schema = schema["json"]
    function = without(spec, "inputSchema") | ({} if schema is None else {"parameters": schema})
    return {"type": "function", "function": function, **without(tool, "toolSpec")}
