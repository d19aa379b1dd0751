"""One message of a record in the form that chat templates read: text, reasoning, tool calls; and is it learned from?"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from megasft.data.problems import WrongError
from megasft.data.record_keys import (
    ARGUMENTS,
    FUNCTION,
    MESSAGE,
    REASONING,
    REASONING_PART,
    TEXT_PART,
    TOOL_CALL,
    check_keys,
    read_flags,
    says_nothing,
)
from megasft.data.records import parse_object
from megasft.data.values import check_text, check_tree

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_TYPES = ("text", "input_text", "output_text", None)
REASONING_TYPES = ("thinking", "reasoning", "reasoning.text", "reasoning.summary", "redacted_thinking")
REASONING_PART_TEXTS = ("thinking", "reasoning", "text", "summary")
ENCRYPTED_TYPES = ("reasoning.encrypted", "redacted_thinking")
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "ipython": "tool", "observation": "tool", "tool_response": "tool", "environment": "tool",
}  # fmt: skip


def read_message(
    raw: Any, where: str, notes: Counter[str], ignored: Iterable[str] = ()
) -> tuple[dict[str, Any], bool | None]:
    """The message, and whether it says that it is learned from (None where it does not say).

    `function_call` and the role `function`, the forms before `tool_calls`, come out as `tool_calls` and `tool`.
    Raises WrongError.
    """
    if not isinstance(raw, dict):
        raise WrongError(f"{where} is not an object", raw)
    role = "tool" if raw.get("role") == "function" else raw.get("role")
    if role not in ROLES:
        remedy = f"; write {role!r} as {_OTHER_ROLES[role]!r}" if isinstance(role, str) and role in _OTHER_ROLES else ""
        raise WrongError(f"{where}: the role is not one of {', '.join(ROLES)}{remedy}", raw)
    check_keys(raw, MESSAGE, where, notes, ignored)
    message: dict[str, Any] = {"role": role}
    calls = _tool_calls(raw, role, where, notes, ignored)
    content, thoughts = _content(raw, role, bool(calls), where, notes, ignored)
    message["content"] = content
    if (name := _agreed(raw, ("name", "tool_name"), where)) is not None:
        message["name"] = check_text(name, f"{where}.name")
    if (number := _agreed(raw, ("tool_call_id", "call_id"), where)) is not None:
        message["tool_call_id"] = _call_id(number, f"{where}.tool_call_id")
    reasoning = _reasoning(raw, thoughts, where, notes, ignored)
    if reasoning is not None:
        if role != "assistant":
            raise WrongError(f"{where}: only assistant messages have reasoning", raw)
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    trained = read_flags(raw, where)
    if trained and role != "assistant":
        raise WrongError(f"{where}: only assistant messages can be learned from", raw)
    return message, trained


def join_parts(
    content: Any, where: str, notes: Counter[str], ignored: Iterable[str] = (), thoughts: list[str] | None = None
) -> str:
    """A text, or the texts of a list of parts joined by newlines, which is how vLLM joins them for such templates.

    `thoughts`, where the message may have any, gets the texts of reasoning parts.
    """
    if not isinstance(content, list):
        return check_text(content, where)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else ""
        if thoughts is not None and kind in REASONING_TYPES:
            if texts:
                raise WrongError(f"{where}: reasoning comes before the text it leads to", part)
            thoughts += _thoughts([part], f"{where}[{i}]", notes, ignored)
            continue
        if not isinstance(part, dict) or kind not in TEXT_TYPES or not isinstance(part.get("text"), str):
            raise WrongError(f"{where}: only text parts can be read; `megasft convert` rewrites tool parts", part)
        check_keys(part, TEXT_PART, f"{where}[{i}]", notes, ignored)
        texts.append(part["text"])
    return check_text("\n".join(text for text in texts if text), where)


def _content(
    raw: dict[str, Any], role: str, has_calls: bool, where: str, notes: Counter[str], ignored: Iterable[str]
) -> tuple[str, list[str]]:
    content, thoughts = raw.get("content"), []  # type: ignore[var-annotated]
    if content is None:
        if not (has_calls and role == "assistant"):
            raise WrongError(f"{where}: `content` may only be missing or null beside `tool_calls`", raw)
        return "", []
    text = join_parts(content, f"{where}.content", notes, ignored, thoughts if role == "assistant" else None)
    return text, thoughts


def _reasoning(
    raw: dict[str, Any], thoughts: list[str], where: str, notes: Counter[str], ignored: Iterable[str]
) -> str | None:
    """The text of whichever key has it; several may say the same."""
    found = {"content": "\n".join(thoughts)} if thoughts else {}
    for key in REASONING:
        value = raw.get(key)
        if isinstance(value, list | dict) and says_nothing(value):
            continue
        if isinstance(value, list):
            value = "\n".join(_thoughts(value, f"{where}.{key}", notes, ignored))
        if value is not None:
            found[key] = check_text(value, f"{where}.{key}")
    spoken = {key: text for key, text in found.items() if text.strip()}
    if len({text.strip() for text in spoken.values()}) > 1:
        first, other, *_ = spoken
        raise WrongError(f"{where}: the reasoning in `{first}` and in `{other}` contradict each other", raw)
    return next(iter({**spoken, **found}.values()), None)


def _thoughts(parts: list[Any], where: str, notes: Counter[str], ignored: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        if isinstance(part, dict) and part.get("type") in ENCRYPTED_TYPES:
            notes["ignored encrypted reasoning"] += 1
            continue
        texts = [part.get(key) for key in REASONING_PART_TEXTS] if isinstance(part, dict) else []
        text = next((text for text in texts if text is not None), None)
        if isinstance(text, list):  # Mistral: a list of text parts
            text = join_parts(text, where, notes, ignored)
        if not isinstance(text, str):
            raise WrongError(f"{where}: reasoning that is not text", part)
        check_keys(part, REASONING_PART, where, notes, ignored)
        yield text


def _agreed(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value of the one of these keys that is there; two of them must say the same."""
    values = {key: raw[key] for key in keys if raw.get(key) is not None}
    if len({str(value) for value in values.values()}) > 1:
        raise WrongError(f"{where}: {' and '.join(f'`{key}`' for key in values)} contradict each other", raw)
    return next(iter(values.values()), None)


# --- tool calls ------------------------------------------------------------------------------------------------------


def _tool_calls(
    raw: dict[str, Any], role: str, where: str, notes: Counter[str], ignored: Iterable[str]
) -> list[dict[str, Any]]:
    calls, old = (None if says_nothing(raw.get(key)) else raw[key] for key in ("tool_calls", "function_call"))
    if calls and old:
        raise WrongError(f"{where}: `tool_calls` and `function_call` are both there; keep `tool_calls`", raw)
    name = "tool_calls" if calls else "function_call"
    if old:
        calls = [old]
    if not calls:
        return []
    if role != "assistant" or not isinstance(calls, list):
        raise WrongError(f"{where}: `{name}` is a list and belongs to an assistant message", raw)
    return [_tool_call(call, f"{where}.{name}[{j}]", notes, ignored) for j, call in enumerate(calls)]


def _tool_call(call: Any, where: str, notes: Counter[str], ignored: Iterable[str]) -> dict[str, Any]:
    """The nested form, with the arguments as an object: what every template in use can render."""
    if not isinstance(call, dict) or call.get("type", "function") not in ("function", "tool_call", None):
        raise WrongError(f"{where} is not a function call", call)
    nested = call.get("function") is not None
    function = call["function"] if nested else call
    if not isinstance(function, dict):
        raise WrongError(f"{where} is not a function call", call)
    check_keys(call, TOOL_CALL, where, notes, ignored)
    if nested:
        check_keys(function, FUNCTION, f"{where}.function", notes, ignored)
        doubled = next((key for key in ("name", *ARGUMENTS) if call.get(key) not in (None, function.get(key))), None)
        if doubled:
            raise WrongError(f"{where}: `{doubled}` stands beside `function`; keep what is in `function`", call)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise WrongError(f"{where}: the function has no name", call)
    given = [key for key in ARGUMENTS if function.get(key) not in (None, "", {})]
    if len(given) > 1:
        raise WrongError(f"{where}: `{given[0]}` and `{given[1]}` are both there; keep `arguments`", call)
    arguments = _arguments(function[given[0]], f"{where}: `{given[0]}`") if given else {}
    checked = {"type": "function", "function": {"name": check_text(function["name"], where), "arguments": arguments}}
    if call.get("id") is not None:
        checked["id"] = _call_id(call["id"], f"{where}.id")
    return checked


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        if not arguments.strip():
            return {}
        parsed = parse_object(check_text(arguments, where).encode())
        if isinstance(parsed, str):
            raise WrongError(f"{where} is {parsed}", arguments)
        arguments = parsed
    if not isinstance(arguments, dict):
        raise WrongError(f"{where} is not an object", arguments)
    check_tree(arguments, where)
    return arguments


def _call_id(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, where)
