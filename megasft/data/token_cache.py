"""Tokenized conversation files on disk, mapped into memory: made once for each content, tokenizer and recipe.

    CACHE/<key>/ids.bin        int32, the tokens of all samples end to end
                mask.bin       bool, the targets among them
                ends.bin       int64, where each sample ends
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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megasft.data import (
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
from megasft.data.identity import MADE_OF, describe
from megasft.data.problems import Note, Notes, Problem, Problems
from megasft.data.records import SUFFIXES, conversation_files
from megasft.data.tokenize import Recipe, Tokens, tokenize_files
from megasft.data.tokenizer import ChatTokenizer
from megasft.messages import UserError, say_once
from megasft.storage.digests import cached_sha256
from megasft.storage.disk_cache import default_cache_dir, make_once

OnError = Literal["stop", "skip"]
# All that decides what samples a conversation becomes.
CODE = (
    json_text, *formats.MODULES, records,
    conversations, message, record_keys, tool_schemas, values, problems, assistant_spans, rendering_proof,
    template, overlong, tokenizer, tokenize,
)  # fmt: skip
COLUMNS = {"ids": np.dtype(np.int32), "mask": np.dtype(np.bool_), "ends": np.dtype(np.int64)}
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Manifest:
    """What there is to say of a cached dataset.

    Attributes:
        samples, tokens, supervised: what came out.
        counts: what `overlong.fit` did, by conversation.
        longest: tokens of the longest conversation.
        problems: how many conversations could not be used.
        first_problems: [number of the file, line, reason, excerpt] of the first of them.
        notes: [what is left out, how often, of how many conversations, [number of the file, line] of the first].
        ends_digest: SHA-256 of ends.bin.
        content_digest: of all columns.
    """

    samples: int
    tokens: int
    supervised: int
    counts: dict[str, int]
    longest: int
    problems: int
    first_problems: list[tuple[int, int, str, str]]
    notes: list[tuple[str, int, int, list[tuple[int, int]]]]
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
    _report(path, files, recipe, manifest, on_error, folder)
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
    numbers = {str(file): number for number, file in enumerate(files)}
    found, counts, notes, longest = Problems(), Counter[str](), Notes(), 0
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
            notes.merge(block.notes)
            longest = max(longest, block.longest)
            for problem in block.problems:
                found.add(problem)
                problems_file.write(f"{problem}\n")
            if time.monotonic() - last > REPORT_SECONDS:
                last = time.monotonic()
                say_once(f"{files[0]}: {samples:,} samples tokenized ({samples / (last - started):,.0f} a second)")
        first = [(numbers[one.file], one.line, one.reason, one.excerpt) for one in found.first]
        left_out = [
            (name, note.count, note.conversations, [(numbers[file], line) for file, line in note.places])
            for name, note in notes.items()
        ]
        digests = digest.hexdigest(), content.hexdigest()
        manifest = Manifest(samples, tokens, supervised, dict(counts), longest, found.total, first, left_out, *digests)
        manifest_file = stack.enter_context((part / "manifest.json").open("w", encoding="utf-8"))
        json.dump(asdict(manifest), manifest_file, indent=2)


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
        others = "1 more problem" if total == 2 else f"{total - 1} more problems"
        more = f" (and {others}; `megasft validate` lists them)" if total > 1 else ""
        raise UserError(f"{first[0]}{more}")
    if not manifest.samples:
        raise UserError(f"{path}: {recipe.nothing_left(manifest.counts.get('dropped', 0), manifest.longest)}")
    counts = manifest.counts
    cut = [f"{counts[what]:,} {what}" for what in ("truncated", "split", "dropped") if counts.get(what)]
    lost = f", {counts['targets cut']:,} supervised tokens lost" if counts.get("targets cut") else ""
    long = f"; over-length: {', '.join(cut)} ({recipe.overlong}){lost}" if cut else ""
    conversations = sum(counts.get(what, 0) for what in ("kept", "truncated", "split", "dropped"))
    say_once(
        f"{path}: {conversations:,} conversations, {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
        f"{manifest.supervised / manifest.tokens:.1%} supervised{long}"
    )
    for name, count, of, places in manifest.notes:
        say_once(f"  {name}: {Note(count, of, [(str(files[number]), line) for number, line in places])}")
    if total:
        say_once(f"{path}: skipped {total:,}, all of them listed in {folder / 'problems.txt'}")
        for problem in first:
            say_once(f"  {problem}")
