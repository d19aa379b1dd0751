"""The tools of a record in the form chat templates read, and nulls that only a table's columns put into calls.

A table (Arrow, Parquet) gives every object of a column every key that any of them has. Written on as JSON, a call of
one tool has the parameters of all others, each null, and a schema the properties of all others: they are left out
again. A null stays where the tool's own schema says that its parameter may be null.
"""

from collections import Counter
from typing import Any

from megasft.data.problems import WrongError
from megasft.data.records import parse_object
from megasft.data.values import check_text, check_tree

Tool = dict[str, Any]
NULL_ARGUMENT, NULL_IN_SCHEMA = "null arguments left out", "nulls left out of `tools`"
_MAY_BE_NULL = ("default", "const")  # keys of a schema of which null is a value


def read_tools(record: dict[str, Any], notes: Counter[str]) -> list[Tool] | None:
    """The tools in `tools`, or in `functions` (OpenAI's old form), each nested in `function`. Raises WrongError."""
    tools = _listed(record.get("tools"), "tools", notes)
    functions = _listed(record.get("functions"), "functions", notes)
    if tools and functions and tools != functions:
        raise WrongError("`tools` and `functions` contradict each other; keep `tools`", functions)
    return tools or functions or None


def drop_null_arguments(messages: list[dict[str, Any]], tools: list[Tool] | None, notes: Counter[str]) -> None:
    """Take nulls out of the arguments of calls that their tools' schemas do not allow."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            schema = schemas.get(function["name"])
            function["arguments"] = _without_nulls(function["arguments"], schema, schema, notes)


def _listed(tools: Any, name: str, notes: Counter[str]) -> list[Tool]:
    if isinstance(tools, str):
        if not tools.strip():
            return []
        parsed = parse_object(b'{"tools": ' + check_text(tools, name).encode() + b"}")
        if isinstance(parsed, str):
            raise WrongError(f"`{name}` is {parsed}", tools)
        tools = parsed["tools"]
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise WrongError(f"`{name}` is not a list of objects", tools)
    check_tree(tools, name)
    return [_nested(tool, f"{name}[{i}]", notes) for i, tool in enumerate(tools)]


def _nested(tool: Tool, where: str, notes: Counter[str]) -> Tool:
    """`{"type": "function", "function": {...}}`, whatever of it was left out."""
    tool = _schema_without_nulls(tool, notes)
    inner = tool.get("function")
    if inner is None:
        inner = {key: value for key, value in tool.items() if key != "type"}
        if "parameters" not in inner and "input_schema" in inner:  # Anthropic's name
            inner["parameters"] = inner.pop("input_schema")
        tool = {"type": tool.get("type", "function"), "function": inner}
    if tool.get("type", "function") != "function" or not isinstance(inner, dict):
        raise WrongError(f"{where} is not a function; templates know no other tools", tool)
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise WrongError(f"{where}: the function has no name", tool)
    if not isinstance(inner.get("parameters", {}), dict):
        raise WrongError(f"{where}: `parameters` is not an object", tool)
    return {"type": "function", **tool}


def _schema_without_nulls(value: Any, notes: Counter[str]) -> Any:
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if item is None and not (key in _MAY_BE_NULL and _allows_null(value, None)):
                notes[NULL_IN_SCHEMA] += 1
            else:
                kept[key] = _schema_without_nulls(item, notes)
        return kept
    return [_schema_without_nulls(item, notes) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any, schema: Any, root: Any, notes: Counter[str]) -> Any:
    schema = _object_form(schema, root)
    if isinstance(value, list):
        return [_without_nulls(item, schema.get("items"), root, notes) for item in value]
    if not isinstance(value, dict):
        return value
    properties, others = schema.get("properties"), schema.get("additionalProperties")
    kept = {}
    for key, item in value.items():
        own = properties.get(key) if isinstance(properties, dict) else None
        own = others if own is None and isinstance(others, dict) else own
        if item is None and not _allows_null(own, root):
            notes[NULL_ARGUMENT] += 1
        else:
            kept[key] = _without_nulls(item, own, root, notes)
    return kept


def _followed(schema: Any, root: Any) -> dict[str, Any]:
    """What `{"$ref": "#/$defs/..."}` refers to, or the schema itself; {} where there is none."""
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for name in reference[2:].split("/"):
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema if isinstance(schema, dict) else {}


def _object_form(schema: Any, root: Any) -> dict[str, Any]:
    """Of a schema with several forms, the first that describes objects or lists."""
    schema = _followed(schema, root)
    forms = [_followed(form, root) for key in ("anyOf", "oneOf", "allOf") for form in schema.get(key) or ()]
    rich = [form for form in forms if {"properties", "items", "additionalProperties"} & form.keys()]
    return rich[0] if rich and "properties" not in schema else schema


def _allows_null(schema: Any, root: Any) -> bool:
    """Whether null is a value of this schema. One that is not there has none; one that names no type has any."""
    if not isinstance(schema, dict):
        return False
    schema = _followed(schema, root)
    kind = schema.get("type")
    if kind == "null" or (isinstance(kind, list) and "null" in kind) or schema.get("nullable") is True:
        return True
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    forms = [form for key in ("anyOf", "oneOf") for form in schema.get(key) or ()]
    if forms:
        return any(_allows_null(form, root) for form in forms)
    return kind is None and "properties" not in schema
