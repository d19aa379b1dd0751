"""ShareGPT: `conversations`, a list of turns with `from` and `value`, as LLaMA-Factory, axolotl and ms-swift read it.

Tools calls are turns of their own (`function_call`, with JSON), and so are results (`observation`, `tool`). The keys
`role` and `content` in place of `from` and `value` are understood too; other keys of a turn stay with its message.
"""

from typing import Any

from megasft.data.formats.messages import read_message
from megasft.data.formats.parts import read_tools
from megasft.data.formats.shape import (
    Changes,
    Message,
    Record,
    WrongShapeError,
    function_call,
    read_list,
    read_text,
    with_system,
    without,
)
from megasft.data.formats.text_calls import parse_loosely, structure

KEYS = ("conversations", "conversation")
ROLES = {
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "function_call": "call", "tool_call": "call",
    "observation": "tool", "tool": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip


def read_sharegpt(record: Record, changes: Changes) -> Record:
    """`record` with its `conversations` as `messages`, and tools in the system prompt as `tools`."""
    key = next((key for key in KEYS if record.get(key) is not None), "")
    if not key:
        raise WrongShapeError("`conversations` is missing or null")
    messages: list[Message] = []
    for i, turn in enumerate(read_list(record[key], key, changes)):
        _add(messages, turn, f"{key}[{i}]", changes)
    record = without(record, key) | {"messages": messages}
    return structure(with_system(read_tools(record, changes), changes), changes, only_with_tools=True)


def _add(messages: list[Message], turn: Any, where: str, changes: Changes) -> None:
    if not isinstance(turn, dict):
        raise WrongShapeError(f"{where} is not an object")
    who, what = "from" if "from" in turn else "role", "value" if "value" in turn else "content"
    name = turn.get(who)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise WrongShapeError(
            f"{where}: `{who}` is {str(name)[:40]!r}, not system, human, gpt, function_call, observation, tool or "
            "another name of these"
        )
    rest = without(turn, who, what)
    rest = {
        key: value for key, value in rest.items() if not (key in ("from", "role", "value", "content") and not value)
    }
    if clash := next((key for key in ("from", "role", "value", "content") if key in rest), ""):
        raise WrongShapeError(f"{where} has both `{who if clash in ('from', 'role') else what}` and `{clash}`")
    if role == "call":
        calls = _calls(turn.get(what), f"{where}.{what}")
        last = messages[-1] if messages else {}
        flags = without(last, "role", "content", "tool_calls")
        if last.get("role") == "assistant" and flags == rest:
            # One turn of a model: what it says, then all it calls at once.
            changes.note("a call behind an assistant's turn, or another call, became part of it")
            last["tool_calls"] = [*last.get("tool_calls", ()), *calls]
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **rest})
        return
    content = turn.get(what)
    if role == "system" and not content:
        changes.note("an empty system turn was left out")
        messages += [{"role": "system", "content": "", **rest}] if rest else []
    else:
        messages += read_message({"role": role, "content": content, **rest}, where, changes)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    parsed = parse_loosely(value) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise WrongShapeError(f"{where} holds no tool call")
    found = []
    for call in calls:
        body = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            shown = read_text(value, where)[:60] if isinstance(value, str) else type(value).__name__
            raise WrongShapeError(f'{where} is not a call: {{"name": .., "arguments": ..}} in JSON, but {shown!r}')
        if more := [key for key in body if key not in ("name", "arguments", "parameters")]:
            raise WrongShapeError(f"{where}: a tool call has no place for the key `{more[0]}`")
        if "arguments" in body and "parameters" in body:
            raise WrongShapeError(f"{where}: the call has both `arguments` and `parameters`")
        outer = {} if body is call else without(call, "function", "type")
        found.append(function_call(body["name"], body.get("arguments", body.get("parameters"))) | outer)
    return found
