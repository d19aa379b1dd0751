"""Write docs/configuration.md: every key of the run file with its type, default and meaning.

    python tools/config_reference.py            # writes the page
    python tools/config_reference.py --check    # exit code 1 if the page is out of date

The source is `megasft/config`: the docstrings of the sections in `schema.py` and the comments beside the keys.
"""

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from megasft.config.schema import RunConfig
from megasft.config.toml import Section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Written by tools/config_reference.py from megasft/config/schema.py. Edit the comments there, then run the tool. -->

A run file is TOML. Every key is optional; a key that you leave out takes its default. An unknown key, a wrong type or a
value out of range is refused before a rank starts, with file, line and key.

`megasft init` writes a minimal run file; [`configs/qwen3_coder_30b.toml`](../configs/qwen3_coder_30b.toml) lists every
key with a comment. `--set section.key=value` overrides any key on the command line, the last one wins:

```bash
megasft train --config configs/demo.toml --set hyperparameters.max_steps=20 --set 'lora.target_modules=["q_proj"]'
```

Relative paths start at the working directory. The run directory keeps the resolved settings in `config.toml`.
"""

TAGS = """\
## `[tags]`

Any keys you like, with strings, numbers or true and false: labels that are stored with the run in its `config.toml`.
"""


def render() -> str:
    """The page."""
    parts = [INTRODUCTION]
    parts += [_section(name, section) for name, section in sections(RunConfig)]
    return "\n".join([*parts, TAGS])


def sections(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """`[data.topology]` and the like with their classes, in the order of the file; `[[data.mix]]` for a list."""
    for name, field in section.model_fields.items():
        inner, is_list = _inner(field.annotation)
        if inner is not None:
            path = f"{prefix}{name}"
            yield f"[[{path}]]" if is_list else f"[{path}]", inner
            yield from sections(inner, f"{path}.")


def keys(section: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a table, without the tables in it and without second names of other keys."""
    return {
        name: field
        for name, field in section.model_fields.items()
        if not field.exclude and (_inner(field.annotation)[0] is None or _inner(field.annotation)[1])
    }


def meanings(section: type[Section]) -> dict[str, str]:
    """The comment beside each key, or in the lines above it."""
    source = inspect.getsource(section)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        lines: list[str] = []
        above, end = statement.lineno - 1, statement.end_lineno or statement.lineno
        while above in comments and comments[above][1]:
            lines.insert(0, comments[above][0])
            above -= 1
        lines += [comments[n][0] for n in range(statement.lineno, end + 1) if n in comments]
        found[statement.target.id] = " ".join(lines)
    return found


def _section(name: str, section: type[Section]) -> str:
    about = inspect.cleandoc(section.__doc__ or "")
    about = re.sub(r"^`\[+[\w.]+\]+`[,:.]? ?", "", about)
    said = meanings(section)
    rows = [
        f"| `{key}` | {_kind(field)} | {_default(field)} | {_sentence(said.get(key, ''))} |"
        for key, field in keys(section).items()
    ]
    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows] if rows else []
    paragraphs = [_sentence(" ".join(text.split())) for text in about.split("\n\n")] if about else []
    return "\n".join([f"## `{name}`", "", *(line for text in paragraphs for line in (text, "")), *table, ""])


def _inner(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a key holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, Section):
            return argument, True
    return None, False


def _kind(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(argument for argument in get_args(annotation) if argument is not NoneType)
    return _name(annotation) + _bounds([*field.metadata, *getattr(annotation, "__metadata__", ())])


def _name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_toml(choice)}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        if _inner(annotation)[1]:
            return "list of tables"
        return "list of " + (_name(inner) if get_origin(inner) is Literal else f"{_name(inner)}s")
    if get_origin(annotation) is dict:
        return "table"
    return {bool: "true or false", int: "integer", float: "number", str: "string", date: "date"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    found: dict[str, Any] = {}
    for one in metadata:
        for part in [one, *getattr(one, "metadata", [])]:
            for name in ("ge", "gt", "le", "lt"):
                if getattr(part, name, None) is not None:
                    found[name] = getattr(part, name)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    # The upper ends of counts and seeds are those of their storage; nobody comes near.
    return "".join(f", {signs[name]} {value}" for name, value in found.items() if name != "lt" or value < 2**15)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)  # {}
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return tomli_w.dumps({"x": value}).partition("=")[2].strip()


def _sentence(text: str) -> str:
    """With a capital, unless it begins with code, with a full stop, and pages as links."""
    text = re.sub(r"\b([a-z-]+\.md)\b", r"[\1](\1)", text.replace("|", "\\|").strip())
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?", ":")) else f"{text}."


def main() -> None:
    """Write the page, or check it."""
    page = render()
    if sys.argv[1:] == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE.name} is out of date: run python tools/config_reference.py")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
