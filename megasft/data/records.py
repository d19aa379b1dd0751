"""The records of a dataset, read one at a time from JSONL and JSON (plain, .gz, .zst) and Parquet files.

Whatever form people keep their conversations in, a record comes out with `messages`: `megasft.data.formats` says how.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megasft.data import formats
from megasft.data.json_text import EXCERPT_CHARS, MAX_LINE_BYTES, parse_object, read_values, visible
from megasft.data.json_text import MAX_DEPTH as MAX_DEPTH
from megasft.data.json_text import too_deep as too_deep
from megasft.messages import UserError, say_once

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
# What the Hub's, LLaMA-Factory's and `save_to_disk`'s folders hold beside their data.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HEAD_BYTES = 4 * EXCERPT_CHARS

LAYOUT_BYTES = 2**16
BOM = b"\xef\xbb\xbf"

BLOCK_RECORDS = 256
BLOCK_BYTES = 4 * 2**20

Record = tuple[int, dict[str, Any] | str, bytes]


@dataclass(slots=True)
class Block:
    """Some records of one file as they were read: lines of JSON, or rows of Parquet.

    A line is (its number, its bytes, why they cannot be used): the last is empty where they can be looked at. A record
    of a JSON array is a line too, with the number of the line that it begins in. `format` is the file's, one of
    `formats.FORMATS`; empty: records stay as they are.
    """

    lines: list[tuple[int, bytes, str]] = field(default_factory=list)
    rows: Any = None  # a pyarrow.RecordBatch
    first_row: int = 0
    format: str = ""


def conversation_files(path: str | Path) -> list[Path]:
    """The conversation files that `path` stands for: itself, or all below a folder, sorted, hidden ones left out.

    Raises:
        UserError: `path` is missing, unreadable, or holds no file of a known kind.
    """
    path = Path(path)
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        below = [file for file in below if file.name not in NO_DATA]
        files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"{path}: the folder holds no conversation file ({kinds})")
    elif not path.exists():
        hub = ""
        if len(path.parts) == 2 and not path.suffix:
            hub = f", or write a dataset of the Hub to a file: megasft convert {path} OUT.jsonl"
        raise UserError(f"{path}: no such file or folder; give a dataset of {kinds}, or a folder of them{hub}")
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


def read_records(file: Path) -> Iterator[Record]:
    """Yield (line, object, its first bytes) for every record; a `str` in place of the object says what is wrong."""
    for block in read_blocks(file):
        yield from parse_block(block)


def read_blocks(file: Path) -> Iterator[Block]:
    """Read a file without parsing its records, which is left to `parse_block`: another process may do that.

    The first record of a known form decides the file's format, which is said if it is another than ours.
    """
    format = ""
    for block in read_raw_blocks(file):
        if block.rows is not None and not formats.KNOWN_KEYS.intersection(block.rows.schema.names):
            names = ", ".join(block.rows.schema.names).encode()
            yield Block([(1, names, "the file has no column `messages`, nor those of another format")])
            return
        if not format and (format := recognize_block(block)) not in ("", "messages"):
            say_once(f"{file}: {formats.FORMATS[format].title}")
        block.format = format
        yield block


def recognize_block(block: Block) -> str:
    """The format of the first record that is of any; "" if none is."""
    objects = (record for _, record, _ in parse_block(block) if isinstance(record, dict))
    return next((found for record in objects if (found := formats.recognize(record))), "")


def read_raw_blocks(file: Path) -> Iterator[Block]:
    """The blocks of a file, whose records stay as they are."""
    return _parquet_blocks(file) if file.suffix == ".parquet" else _line_blocks(file)


def parse_block(block: Block) -> Iterator[Record]:
    """The records of a block, as `read_records` yields them."""
    for number, raw, reason in block.lines:
        yield number, reason or _in_messages(parse_object(raw), block.format), raw[:HEAD_BYTES]
    for i in range(len(block.rows) if block.rows is not None else 0):
        try:
            row = {name: block.rows.column(name)[i].as_py() for name in block.rows.schema.names}
        except UnicodeDecodeError:
            yield block.first_row + i, "not UTF-8", b""
            continue
        yield block.first_row + i, _in_messages(_without_nulls(row), block.format), b""


def _in_messages(record: dict[str, Any] | str, format: str) -> dict[str, Any] | str:
    return formats.to_messages(record, format) if format and isinstance(record, dict) else record


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
        layout = _layout(file)
        with _open(file) as stream:
            if layout == "lines":
                lines = _numbered(stream)
            else:
                lines = read_values(stream, stream.read(HEAD_BYTES).removeprefix(BOM), array=layout == "array")
            for number, line, reason in lines:
                yield number, line, reason
    except (OSError, EOFError, zlib.error) as error:  # pyarrow's decompression errors are OSErrors
        yield number + 1, b"", f"the file is damaged or cut short from here on ({error})"


def _layout(file: Path) -> str:
    """`lines`, `array`, or `objects`: one behind another, over any number of lines. The first two lines decide."""
    with contextlib.suppress(OSError, EOFError, zlib.error), _open(file) as stream:
        begin = stream.read(LAYOUT_BYTES).removeprefix(BOM)
        first, second = (*filter(None, map(bytes.strip, begin.split(b"\n"))), b"", b"")[:2]
        json = ".json" in file.suffixes[-2:]
        if first[:1] == b"[" and (json or not (first[-1:] == b"]" and second)):
            return "array"
        if first[:1] == b"{" and (json or (first == b"{" and second[:1] == b'"')):
            return "objects"
    return "lines"


def _numbered(stream: BinaryIO) -> Iterator[tuple[int, bytes, str]]:
    """The lines of a stream that are not blank; of one that is too long its beginning."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > MAX_LINE_BYTES:
            begin = line[:HEAD_BYTES]
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            yield number, begin, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB"
        elif line.strip():
            yield number, line, ""


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**20)
    return file.open("rb")


def _parquet_blocks(file: Path) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
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
