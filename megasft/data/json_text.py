"""JSON as users write it: objects out of bytes, the records of an array one at a time, text that is safe to print."""

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_LINE_BYTES = 64 * 2**20
MAX_DEPTH = 64
EXCERPT_CHARS = 80
CHUNK_BYTES = 2**20

# A string up to its closing quote, or to where the line or the buffer ends; or a character that nests or separates.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\[^\n])*+(?:"|\\?\Z)?|[\[\]{},]')


def visible(text: str, limit: int = EXCERPT_CHARS) -> str:
    """`text` on one line, cut to `limit` characters, with everything a terminal could obey written as an escape."""
    cut = text[:limit]
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)
    return shown + ("..." if len(text) > limit else "")


def parse_object(line: bytes) -> dict[str, Any] | str:
    """The JSON object that `line` holds, or the reason why it holds none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        return f"nested deeper than {MAX_DEPTH} levels"
    except json.JSONDecodeError as error:
        row = f"line {error.lineno} of the record, " if error.lineno > 1 else ""
        return f"not JSON ({error.msg}, {row}column {error.colno})"
    except ValueError as error:  # a key given twice, NaN, an integer too long to read
        return f"not JSON that can be used ({visible(str(error))})"
    if not isinstance(record, dict):
        return "not an object"
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and too_deep(record):
        return f"nested deeper than {MAX_DEPTH} levels"
    return record


def parse_value(text: str) -> tuple[Any, str]:
    """(the JSON value in `text`, ""), or (None, the reason why there is none)."""
    parsed = parse_object(b'{"value":' + text.encode("utf-8", "surrogatepass") + b"}")
    return (None, parsed) if isinstance(parsed, str) else (parsed.get("value"), "")


def too_deep(value: Any) -> bool:
    """Whether objects and lists lie inside each other more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def read_values(stream: BinaryIO, head: bytes, array: bool) -> Iterator[tuple[int, bytes, str]]:
    """Yield (line, bytes, what is wrong) for each value of a JSON array, or of objects written one behind another.

    Reads a chunk at a time, and values are of any form: over many lines, or all on one.

    Args:
        head: what was already read of the stream.
        array: whether it is an array.
    """
    base = int(array)  # the depth at which values lie
    buffer, ended, depth, position = head, False, 0, 0
    start = 0  # where the next value begins
    line, counted = 1, 0  # the line of the byte at `counted`
    closed = False
    while True:
        for token in _TOKEN.finditer(buffer, position):
            text, at, position = token[0], token.start(), token.end()
            if text[:1] == b'"':
                if position == len(buffer) and not ended:  # its end may lie in the next chunk
                    position = at
                    break
                continue
            if closed:
                continue
            before = depth
            depth = max(0, depth + (text in b"[{") - (text in b"]}"))
            if array and before == 0 and depth == 1:
                start = position
                continue
            over = depth == base - 1 if array else depth == base and text in b"]}"
            if over or (array and text == b"," and depth == base):
                value = buffer[start : at if array else position]
                first = start + len(value) - len(value.lstrip())
                line, counted = line + buffer.count(b"\n", counted, first), first
                if value.strip():
                    yield line, value.strip(), ""
                start = position
            closed = array and over
        if ended:
            break
        if len(buffer) - start > MAX_LINE_BYTES:
            line += buffer.count(b"\n", counted, len(buffer) - len(buffer[start:].lstrip()))
            limit = f"longer than {MAX_LINE_BYTES // 2**20} MiB; nothing behind it was read"
            yield line, buffer[start : start + CHUNK_BYTES], f"the record is {limit}"
            return
        line, counted = line + buffer.count(b"\n", counted, start), 0
        buffer, position, start = buffer[start:], position - start, 0
        chunk = stream.read(CHUNK_BYTES)
        ended = not chunk
        buffer += chunk
    rest = buffer[start:]
    line += buffer.count(b"\n", counted, start + len(rest) - len(rest.lstrip()))
    if closed and rest.strip():
        yield line, rest.strip(), "behind the end of the array; write one array, or one object a line"
    elif array and not closed:
        yield line, rest.strip(), "the array has no end: the file is damaged or cut short"
    elif rest.strip():
        yield line, rest.strip(), ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
