"""Read answers as servers do: reasoning, text, and the tool calls of the two formats that Qwen3's templates write.

    hermes   <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>                          Qwen3, Hermes
    xml      <tool_call><function=f><parameter=x>1</parameter></function></tool_call>             Qwen3-Coder

What is accepted is what vLLM's parsers `hermes` and `qwen3_coder` accept (vllm-project/vllm at 0b13f933): of both
formats a last call without its closing tag, of XML functions without `<tool_call>`, several functions in one, and
parameters without their closing tag. Unlike there, a malformed call does not spoil the others, and what is no boolean
stays text.
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megasft.data.tokenizer import ChatTokenizer

Format = Literal["hermes", "xml"]
Tools = Sequence[dict[str, Any]] | None

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_FUNCTION = re.compile(r"<function=(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(.*?)(?:</parameter>|(?=<parameter=)|(?=</function>)|$)", re.DOTALL)
_INTEGER, _NUMBER = ("int", "uint", "long", "short", "unsigned"), ("num", "float", "double")
_BOOLEAN, _STRUCTURE = ("bool", "binary"), ("object", "dict", "array", "arr", "list", "tuple")


@dataclass(frozen=True)
class Call:
    """A tool call that could be read."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer: its text without reasoning and outer whitespace, and its calls; None is one that cannot be read."""

    text: str
    calls: tuple[Call | None, ...] = ()


def find_format(tokenizer: ChatTokenizer) -> Format | None:
    """The format in which the chat template writes tool calls; None if it is neither, or writes none."""
    call = {"type": "function", "function": {"name": "find", "arguments": {"word": "a b"}}}
    tools = [{"type": "function", "function": {"name": "find", "description": "", "parameters": {
        "type": "object", "properties": {"word": {"type": "string"}}}}}]  # fmt: skip
    asked = {"role": "user", "content": "?"}
    answers = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        text = tokenizer.render([asked, answers], tools)
        before = tokenizer.render([asked, {"role": "assistant", "content": "?"}], tools)
    except Exception:  # a template is a program: it may refuse anything
        return None
    # What the template says about tools in front may hold examples of calls.
    begin = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), 0)
    said = text[begin:]
    formats: tuple[Format, ...] = ("hermes", "xml")
    return next((one for one in formats if Call("find", {"word": "a b"}) in read_reply(said, one, tools).calls), None)


def read_reply(text: str, format: Format | None, tools: Tools = None) -> Reply:
    """Read an answer, without the token that ends it. Without a format all of it is text.

    Args:
        tools: whose schemas give the parameters of the XML format their types.
    """
    text = _without_reasoning(text)
    if format is None:
        return Reply(text.strip())
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    read: Callable[[str], list[Call | None]] = _read_json if format == "hermes" else partial(_read_xml, schemas=schemas)
    blocks = [match[1] for match in _BLOCK.finditer(text)]
    begin = text.find("<tool_call>")
    if not blocks and format == "xml" and (begin := text.find("<function=")) >= 0:
        blocks = [text[begin:]]
    calls = [call for block in blocks for call in read(block)]
    return Reply((text[:begin] if blocks else text).strip(), tuple(calls))


def _without_reasoning(text: str) -> str:
    """What stands behind `</think>`; nothing, where a thought does not end."""
    if "</think>" in text:
        return text.partition("</think>")[2]
    return "" if text.lstrip().startswith("<think>") else text


def _read_json(block: str) -> list[Call | None]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(block)
        if isinstance(found, dict) and isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict):
            return [Call(found["name"], found["arguments"])]
    return [None]


def _read_xml(block: str, schemas: dict[str, Any]) -> list[Call | None]:
    functions = [match[1] for match in _FUNCTION.finditer(block)]
    return [_function(text, schemas) for text in functions] or [None]


def _function(text: str, schemas: dict[str, Any]) -> Call | None:
    name, closed, body = text.partition(">")
    if not closed:
        return None
    schema = schemas.get(name)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    arguments = {}
    for match in _PARAMETER.finditer(body):
        key, closed, value = match[1].partition(">")
        if not closed:
            return None
        value = value.removeprefix("\n").removesuffix("\n")
        own = properties.get(key) if isinstance(properties, dict) else None
        arguments[key] = value if own is None and isinstance(properties, dict) else _typed(value, own)
    return Call(name, arguments)


def _typed(text: str, schema: Any) -> Any:
    """The value of a parameter by the types of its schema; the text itself where it is of none of them.

    `null` is null whatever the type, as in vLLM. `None` is too, unless the parameter is a string: Qwen3-Coder's
    template writes a null so.
    """
    types = _types(schema)
    if text.lower() == "null" or (text == "None" and "string" not in types):
        return None
    for kind in types:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if kind.startswith(_INTEGER):
                return int(text)
            if kind.startswith(_NUMBER):
                return float(text)
            if kind.startswith(_BOOLEAN) and text.strip().lower() in ("true", "false"):
                return text.strip().lower() == "true"
            if kind.startswith(_STRUCTURE):
                return _structure(text)
    return text


def _structure(text: str) -> Any:
    """JSON, or Python's way of writing it. Raises ValueError and what `ast` raises."""
    try:
        return json.loads(text)
    except ValueError:
        value = ast.literal_eval(text.strip())
    json.dumps(value)
    return value


def _types(schema: Any) -> list[str]:
    """The types that a schema names, those of its alternatives too; strings last, as any text is one."""
    schema = schema if isinstance(schema, dict) else {}
    named = schema.get("type")
    found = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
    for key in ("anyOf", "oneOf"):
        others = schema.get(key)
        found += [kind for one in others for kind in _types(one)] if isinstance(others, list) else []
    names = [kind.strip().lower() for kind in found if isinstance(kind, str)]
    return sorted(names or ["string"], key=lambda kind: kind == "string")
