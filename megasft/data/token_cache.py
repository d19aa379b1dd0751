"""Tokenized conversation files on disk, mapped into memory: made once for each content, tokenizer and recipe.

    CACHE/<key>/ids.bin        int32, the tokens of all samples end to end
                mask.bin       bool, the targets among them
                ends.bin       int64, where each sample ends
                places.bin     int64, file and line of the conversation that each sample is of
                problems.txt   every conversation that could not be used, and why
                made_of.json   digests of the files, tokenizer and settings (`data.identity`)
                manifest.json  counts, and what the other files must be like
    CACHE/digests/             what the content of a file was, for as long as nobody has touched it

`storage.disk_cache` says how a folder comes to be whole or not there at all.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megasft.data import (
    account,
    assistant_spans,
    conversations,
    formats,
    json_text,
    message,
    overlong,
    problems,
    record_keys,
    records,
    rendering_proof,
    template,
    tokenize,
    tokenizer,
    tool_schemas,
    values,
)
from megasft.data.account import Account, Tally
from megasft.data.identity import MADE_OF, describe
from megasft.data.problems import OnError
from megasft.data.records import SUFFIXES, conversation_files
from megasft.data.tokenize import Recipe, Tokens, tokenize_files
from megasft.data.tokenizer import ChatTokenizer
from megasft.messages import UserError, say_once
from megasft.storage.digests import cached_sha256
from megasft.storage.disk_cache import default_cache_dir, make_once

# All that decides what samples a conversation becomes.
CODE = (
    json_text, *formats.MODULES, records,
    conversations, message, record_keys, tool_schemas, values, problems, assistant_spans, rendering_proof,
    template, overlong, tokenizer, tokenize, account,
)  # fmt: skip
COLUMNS = {
    "ids": np.dtype(np.int32),
    "mask": np.dtype(np.bool_),
    "ends": np.dtype(np.int64),
    "places": np.dtype(np.int64),  # `account.Place`s
}
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Manifest(Account):
    """What there is to say of a cached dataset.

    Attributes:
        ends_digest: SHA-256 of ends.bin.
        content_digest: of ids, mask and ends.
    """

    ends_digest: str
    content_digest: str


def prepare(
    path: str | Path,
    tokenizer: ChatTokenizer,
    recipe: Recipe,
    on_error: OnError = "stop",
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """The folder in the cache with the samples of a conversation file or a folder of them, made now if need be.

    Says on standard error what was skipped and cut.

    Raises:
        UserError: a conversation cannot be used and `on_error` is "stop"; there is nothing to learn from at all; the
            cache cannot be written.
    """
    files = conversation_files(path)
    root = Path(cache_dir or default_cache_dir()).expanduser()
    digests = _content_digests(files, root)
    folder = root / _key(files, digests, tokenizer, recipe)

    def make(part: Path) -> None:
        (part / MADE_OF).write_text(describe(files, digests, tokenizer.fingerprint, recipe), encoding="utf-8")
        _make(part, files, _unchanged(tokenize_files(files, tokenizer, recipe, workers), files, digests, root))

    try:
        waiting = f"{path}: another run tokenizes the same data; waiting for it"
        manifest = make_once(folder, _read_manifest, make, waiting)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"[data] cache_dir: {root} cannot be written ({reason}); name another folder") from None
    manifest.report(path, files, recipe, on_error, f"all of them listed in {folder / 'problems.txt'}")
    return folder


def open_columns(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a finished folder of the cache, mapped into memory; writing to them changes no file."""
    return {name: np.memmap(folder / f"{name}.bin", dtype, mode="c") for name, dtype in COLUMNS.items()}


def content_digest(folder: Path) -> str:
    """What a finished folder of the cache has noted of its columns' content."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["content_digest"]


# --- what the cache is keyed by --------------------------------------------------------------------------------------


def _key(files: Sequence[Path], digests: Sequence[str], chat: ChatTokenizer, recipe: Recipe) -> str:
    """Changes with all that decides the samples: content and kind of the files, tokenizer, template, recipe, code."""
    code = hashlib.sha256()
    for module in (*CODE, sys.modules[__name__]):
        code.update(Path(str(module.__file__)).read_bytes())
    parts: list[Any] = [code.hexdigest(), chat.fingerprint, asdict(recipe), version("transformers")]
    kinds = [next(kind for kind in SUFFIXES if file.name.endswith(kind)) for file in files]
    parts += [version("tokenizers"), kinds, list(digests)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content_digests(files: Sequence[Path], root: Path) -> list[str]:
    try:
        return [cached_sha256(file, root) for file in files]
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: cannot be read ({error.strerror})") from None


# --- making a folder of the cache ------------------------------------------------------------------------------------


def _unchanged(tokens: Iterator[Tokens], files: Sequence[Path], digests: list[str], root: Path) -> Iterator[Tokens]:
    """`tokens`, and a look afterwards whether the files are still what `digests` say."""
    yield from tokens
    if _content_digests(files, root) != digests:
        raise UserError(f"{files[0] if len(files) == 1 else files[0].parent}: changed while it was read; start again")


def _make(part: Path, files: Sequence[Path], blocks: Iterator[Tokens]) -> None:
    """Fill a folder of the cache."""
    tally = Tally(files)
    digest, content = hashlib.sha256(), hashlib.sha256()
    started = last = time.monotonic()
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context((part / f"{name}.bin").open("wb")) for name in COLUMNS}
        problems_file = stack.enter_context((part / "problems.txt").open("w", encoding="utf-8"))
        for block in blocks:
            ends = tally.tokens + block.lengths.cumsum()
            columns = {"ids": block.ids, "mask": block.mask, "ends": ends}
            for column in columns.values():
                content.update(column.tobytes())
            for name, column in (columns | {"places": tally.places(block)}).items():
                streams[name].write(column.tobytes())
            digest.update(ends.tobytes())
            tally.add(block)
            for problem in block.problems:
                problems_file.write(f"{problem}\n")
            if time.monotonic() - last > REPORT_SECONDS:
                last, rate = time.monotonic(), tally.samples / (time.monotonic() - started)
                say_once(f"{files[0]}: {tally.samples:,} samples tokenized ({rate:,.0f} a second)")
        manifest = Manifest(
            **asdict(tally.account()), ends_digest=digest.hexdigest(), content_digest=content.hexdigest()
        )
        manifest_file = stack.enter_context((part / "manifest.json").open("w", encoding="utf-8"))
        json.dump(asdict(manifest), manifest_file, indent=2)


def _read_manifest(folder: Path) -> Manifest | None:
    """What is in a folder of the cache; None if it is not there, or not what was written."""
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        for name, dtype in COLUMNS.items():
            length = manifest.tokens if name in ("ids", "mask") else manifest.samples
            if (folder / f"{name}.bin").stat().st_size != length * dtype.itemsize:
                return None
        with (folder / "ends.bin").open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest() == manifest.ends_digest
        return manifest if whole else None
    except (OSError, ValueError, TypeError):
        return None
