"""Tokenized conversation files on disk, mapped into memory: made once for each content, tokenizer and recipe.

    CACHE/<key>/ids.bin        int32, the tokens of all samples end to end
                mask.bin       bool, the targets among them
                ends.bin       int64, where each sample ends
                problems.txt   every conversation that could not be used, and why
                manifest.json  counts, and what the other files must be like
    CACHE/digests/             what the content of a file was, for as long as nobody has touched it

A folder gets its name when all that is in it is on the disk, so one that is there is whole. Whoever makes one holds
the lock beside it; the kernel takes that from a process that ends, however it ends.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megasft.data import conversations, records, spans, template, tokenize, tokenizer
from megasft.data.conversations import Problem, Problems
from megasft.data.records import SUFFIXES, conversation_files
from megasft.data.tokenize import Recipe, Tokens, tokenize_files
from megasft.data.tokenizer import ChatTokenizer
from megasft.errors import UserError

OnError = Literal["stop", "skip"]
COLUMNS = {"ids": np.dtype(np.int32), "mask": np.dtype(np.bool_), "ends": np.dtype(np.int64)}
UNSETTLED_SECONDS = 3.0  # a file written to so recently may change again without its times showing it
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Manifest:
    """What there is to say of a cached dataset.

    Attributes:
        samples, tokens, supervised: what came out.
        counts: what `template.fit` did, by conversation.
        problems: how many conversations could not be used.
        first_problems: [number of the file, line, reason, excerpt] of the first of them.
        ends_digest: SHA-256 of ends.bin.
        content_digest: of all columns.
    """

    samples: int
    tokens: int
    supervised: int
    counts: dict[str, int]
    problems: int
    first_problems: list[tuple[int, int, str, str]]
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
    manifest = _read_manifest(folder)
    if manifest is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_suffix(".lock"), path):
                manifest = _read_manifest(folder)  # another may have made it meanwhile
                if manifest is None:
                    tokens = _unchanged(tokenize_files(files, tokenizer, recipe, workers), files, digests, root)
                    _make(folder, files, tokens)
                    manifest = _read_manifest(folder)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"[data] cache_dir: {root} cannot be written ({reason}); name another folder") from None
    assert manifest is not None
    _report(path, files, recipe, manifest, on_error, folder)
    return folder


def open_columns(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a finished folder of the cache, mapped into memory; writing to them changes no file."""
    return {name: np.memmap(folder / f"{name}.bin", dtype, mode="c") for name, dtype in COLUMNS.items()}


def content_digest(folder: Path) -> str:
    """What a finished folder of the cache has noted of its columns' content."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["content_digest"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/megasft`, or `~/.cache/megasft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasft"


# --- what the cache is keyed by --------------------------------------------------------------------------------------


def _key(files: Sequence[Path], digests: Sequence[str], chat: ChatTokenizer, recipe: Recipe) -> str:
    """Changes with all that decides the samples: content and kind of the files, tokenizer, template, recipe, code."""
    code = hashlib.sha256()
    for module in (records, conversations, spans, template, tokenizer, tokenize, sys.modules[__name__]):
        code.update(Path(str(module.__file__)).read_bytes())
    parts: list[Any] = [code.hexdigest(), chat.fingerprint, asdict(recipe), version("transformers")]
    kinds = [next(kind for kind in SUFFIXES if file.name.endswith(kind)) for file in files]
    parts += [version("tokenizers"), kinds, list(digests)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content_digests(files: Sequence[Path], root: Path) -> list[str]:
    try:
        return [_content_digest(file, root / "digests") for file in files]
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: cannot be read ({error.strerror})") from None


def _content_digest(file: Path, notes: Path) -> str:
    """SHA-256 of a file; remembered for as long as no time, size or number of the file changes."""
    note = notes / hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]
    before = _stat(file)
    with contextlib.suppress(OSError, ValueError):
        *remembered, digest = note.read_text().split()
        if remembered == before:
            return digest
    started = time.time()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    status = file.stat()
    if _stat(file) == before and max(status.st_mtime, status.st_ctime) < started - UNSETTLED_SECONDS:
        part = note.with_name(f"{note.name}.{socket.gethostname()}.{os.getpid()}")
        with contextlib.suppress(OSError):  # then it is read again next time
            notes.mkdir(parents=True, exist_ok=True)
            part.write_text(" ".join([*before, digest]))
            part.replace(note)
    return digest


def _stat(file: Path) -> list[str]:
    status = file.stat()
    return [
        str(value) for value in (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    ]


# --- making a folder of the cache ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(file: Path, path: str | Path) -> Iterator[None]:
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{path}: another run tokenizes the same data; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: whoever is done first gives the folder its name
        yield


def _unchanged(tokens: Iterator[Tokens], files: Sequence[Path], digests: list[str], root: Path) -> Iterator[Tokens]:
    """`tokens`, and a look afterwards whether the files are still what `digests` say."""
    yield from tokens
    if _content_digests(files, root) != digests:
        raise UserError(f"{files[0] if len(files) == 1 else files[0].parent}: changed while it was read; start again")


def _make(folder: Path, files: Sequence[Path], blocks: Iterator[Tokens]) -> None:
    """Write a folder beside where it belongs, and move it there."""
    _remove_leftovers(folder.parent)
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.part")
    shutil.rmtree(part, ignore_errors=True)  # of one who was killed: we hold the lock
    part.mkdir()
    numbers = {str(file): number for number, file in enumerate(files)}
    problems, counts = Problems(), Counter[str]()
    digest, content = hashlib.sha256(), hashlib.sha256()
    samples = tokens = supervised = 0
    started = last = time.monotonic()
    with contextlib.ExitStack() as stack:
        ids_file, mask_file, ends_file = (stack.enter_context((part / f"{name}.bin").open("wb")) for name in COLUMNS)
        problems_file = stack.enter_context((part / "problems.txt").open("w", encoding="utf-8"))
        for block in blocks:
            ends = tokens + block.lengths.cumsum()
            for stream, column in ((ids_file, block.ids), (mask_file, block.mask), (ends_file, ends)):
                stream.write(column.tobytes())
                content.update(column.tobytes())
            digest.update(ends.tobytes())
            samples, tokens = samples + len(ends), tokens + len(block.ids)
            supervised += int(block.mask.sum())
            counts += block.counts
            for problem in block.problems:
                problems.add(problem)
                problems_file.write(f"{problem}\n")
            if time.monotonic() - last > REPORT_SECONDS:
                last = time.monotonic()
                _say(f"{files[0]}: {samples:,} samples tokenized ({samples / (last - started):,.0f} a second)")
        first = [(numbers[one.file], one.line, one.reason, one.excerpt) for one in problems.first]
        digests = digest.hexdigest(), content.hexdigest()
        manifest = Manifest(samples, tokens, supervised, dict(counts), problems.total, first, *digests)
        manifest_file = stack.enter_context((part / "manifest.json").open("w", encoding="utf-8"))
        json.dump(asdict(manifest), manifest_file, indent=2)
        for written in (ids_file, mask_file, ends_file, problems_file, manifest_file):
            written.flush()
            os.fsync(written.fileno())
    if _read_manifest(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        part.rename(folder)
    except OSError:
        if _read_manifest(folder) is None:
            raise
        shutil.rmtree(part)  # on another host, without a lock between us, somebody was faster


def _remove_leftovers(root: Path) -> None:
    """Delete what runs on this host have left that were killed while they wrote."""
    for part in root.glob(f"*.{socket.gethostname()}.part"):
        with contextlib.suppress(OSError), (root / f"{part.name.partition('.')[0]}.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)


def _read_manifest(folder: Path) -> Manifest | None:
    """What is in a folder of the cache; None if it is not there, or not what was written."""
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        lengths = {"ids": manifest.tokens, "mask": manifest.tokens, "ends": manifest.samples}
        for name, dtype in COLUMNS.items():
            if (folder / f"{name}.bin").stat().st_size != lengths[name] * dtype.itemsize:
                return None
        with (folder / "ends.bin").open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest() == manifest.ends_digest
        return manifest if whole else None
    except (OSError, ValueError, TypeError):
        return None


# --- what is said ----------------------------------------------------------------------------------------------------


def _report(
    path: str | Path, files: Sequence[Path], recipe: Recipe, manifest: Manifest, on_error: OnError, folder: Path
) -> None:
    first = [Problem(str(files[number]), line, *why) for number, line, *why in manifest.first_problems]
    total = manifest.problems
    if total and on_error == "stop":
        more = f" (and {total - 1} more problems; `megasft validate` lists them)" if total > 1 else ""
        raise UserError(f"{first[0]}{more}")
    if not manifest.samples:
        raise UserError(f"{path}: no conversation with something to learn from")
    counts = manifest.counts
    cut = [f"{counts[what]:,} {what}" for what in ("truncated", "split", "dropped") if counts.get(what)]
    long = f"; over-length: {', '.join(cut)} ({recipe.overlong})" if cut else ""
    conversations = sum(counts.get(what, 0) for what in ("kept", "truncated", "split", "dropped"))
    _say(
        f"{path}: {conversations:,} conversations, {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
        f"{manifest.supervised / manifest.tokens:.1%} supervised{long}"
    )
    if total:
        _say(f"{path}: skipped {total:,}, all of them listed in {folder / 'problems.txt'}")
        for problem in first:
            _say(f"  {problem}")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
