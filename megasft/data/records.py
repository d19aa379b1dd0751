"""The records of a dataset: JSON objects from JSONL (plain, .gz, .zst) and Parquet files, read one at a time."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megasft.messages import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MAX_LINE_BYTES = 64 * 2**20
MAX_DEPTH = 64
EXCERPT_CHARS = 80
HEAD_BYTES = 4 * EXCERPT_CHARS

BLOCK_RECORDS = 256
BLOCK_BYTES = 4 * 2**20

Record = tuple[int, dict[str, Any] | str, bytes]


@dataclass(slots=True)
class Block:
    """Some records of one file as they were read: lines of JSON, or rows of Parquet.

    A line is (its number, its bytes, why they cannot be used): the last is empty where they can be looked at.
    """

    lines: list[tuple[int, bytes, str]] = field(default_factory=list)
    rows: Any = None  # a pyarrow.RecordBatch
    first_row: int = 0


def conversation_files(path: str | Path) -> list[Path]:
    """The conversation files that `path` stands for: itself, or all below a folder, sorted, hidden ones left out.

    Raises:
        UserError: `path` is missing, unreadable, or holds no file of a known kind.
    """
    path = Path(path)
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"{path}: the folder holds no conversation file ({kinds})")
    elif not path.exists():
        raise UserError(f"{path}: no such file or folder; give a dataset of {kinds}, or a folder of them")
    elif not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; conversations are read from {kinds}")
    else:
        files = [path]
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return files


def read_records(file: Path, columns: tuple[str, ...] = ("messages",)) -> Iterator[Record]:
    """Yield (line, object, its first bytes) for every record; a `str` in place of the object says what is wrong.

    A Parquet file must have the first of `columns`; all that it has are read.
    """
    for block in read_blocks(file, columns):
        yield from parse_block(block)


def read_blocks(file: Path, columns: tuple[str, ...] = ("messages",)) -> Iterator[Block]:
    """Read a file without parsing its records, which is left to `parse_block`: another process may do that."""
    return _parquet_blocks(file, columns) if file.suffix == ".parquet" else _line_blocks(file)


def parse_block(block: Block) -> Iterator[Record]:
    """The records of a block, as `read_records` yields them."""
    for number, raw, reason in block.lines:
        yield number, reason or parse_object(raw), raw[:HEAD_BYTES]
    for i in range(len(block.rows) if block.rows is not None else 0):
        try:
            row = {name: block.rows.column(name)[i].as_py() for name in block.rows.schema.names}
        except UnicodeDecodeError:
            yield block.first_row + i, "not UTF-8", b""
            continue
        yield block.first_row + i, _without_nulls(row), b""


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
        return f"not JSON ({error.msg}, column {error.colno})"
    except ValueError as error:  # a key given twice, NaN, an integer too long to read
        return f"not JSON that can be used ({visible(str(error))})"
    if not isinstance(record, dict):
        return "not an object"
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and too_deep(record):
        return f"nested deeper than {MAX_DEPTH} levels"
    return record


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


def _line_blocks(file: Path) -> Iterator[Block]:
    block, size = Block(), 0
    for line in _lines(file):
        block.lines.append(line)
        size += len(line[1])
        if len(block.lines) == BLOCK_RECORDS or size >= BLOCK_BYTES:
            yield block
            block, size = Block(), 0
    if block.lines:
        yield block


def _lines(file: Path) -> Iterator[tuple[int, bytes, str]]:
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    begin = line[:HEAD_BYTES]
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_LINE_BYTES)
                    yield number, begin, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB"
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line, ""
    except (OSError, EOFError, zlib.error) as error:  # pyarrow's decompression errors are OSErrors
        yield number + 1, b"", f"the file is damaged or cut short from here on ({error})"


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**20)
    return file.open("rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_blocks(file: Path, wanted: tuple[str, ...]) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            if wanted[0] not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names).encode()
                yield Block([(1, names, f"the file has no column `{wanted[0]}`")])
                return
            for batch in table.iter_batches(batch_size=32):
                yield Block(rows=batch, first_row=number + 1)
                number += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        yield Block([(number + 1, b"", f"the file is damaged or not Parquet ({visible(str(error))})")])


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column every key, null where the object had none: leave those out again."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
