"""Run directories: which there are, what state each is in, and its lines as they come."""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megasft.board.content import Content
from megasft.board.tail import Tail, read_text, skim
from megasft.messages import UserError

METRICS, CONFIG, LOCK = "metrics.jsonl", "config.toml", ".lock"
ABOUT, ANSWERS = "about.json", "answers.json"
TEXT = 8000  # characters of a text in an answer
MOST_ANSWERS = 64
DEPTH, MOST = 3, 200  # folders below a given one that are searched, and the most runs that are shown
SKIMMED = 400  # lines shown of a long run until all of it is read
LONG = 2 << 20  # bytes
PAUSE = 0.15  # seconds without a request after which reading continues
RECENT = 30.0  # seconds since the last line, after which a run without a lock counts as stopped


class Run:
    """One run directory, read as it grows.

    Attributes:
        id: names the run in addresses; says nothing of its path.
        lock: to be held while `content` is read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.id = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        self.lock = threading.Lock()
        self._tail = Tail(folder / METRICS)
        self._content = Content()
        self._skimmed: Content | None = None
        self._files: dict[str, tuple[float, Any]] = {}  # what a file held, and when that was written

    @property
    def content(self) -> Content:
        """What is known of the run; of a long one a part until all of it is read."""
        return self._skimmed or self._content

    @property
    def version(self) -> tuple[int, int]:
        """(generation, bytes read): another generation where lines were taken back or come in more detail."""
        if self._skimmed:
            return 2 * self._tail.restarts, 0
        return 2 * self._tail.restarts + 1, self._tail.offset

    @property
    def share_read(self) -> float:
        """0 to 1, of the file as it was last seen."""
        return min(1.0, self._tail.offset / self._tail.size) if self._tail.size else 1.0

    def preview(self) -> None:
        """Show a long run at once by a few of its lines."""
        with contextlib.suppress(OSError):
            if not self._tail.offset and (self.folder / METRICS).stat().st_size > LONG:
                content = Content()
                content.add(skim(self.folder / METRICS, SKIMMED))
                with self.lock:
                    self._skimmed = content

    def advance(self) -> bool:
        """Read the next lines, at most a megabyte; returns whether there were any."""
        restarts = self._tail.restarts
        lines = self._tail.read()
        with self.lock:
            if self._tail.restarts != restarts:
                self._content = Content()
            self._content.add(lines)
            if not lines:
                self._skimmed = None
        return bool(lines)

    def config(self) -> dict[str, Any]:
        """The resolved settings; {} where they cannot be read."""
        return self._parsed(CONFIG, tomllib.loads)

    def about(self) -> dict[str, Any]:
        """Data, topology and environment, as `megasft.board.about` writes them; {} where they cannot be read."""
        return self._parsed(ABOUT, json.loads)

    def answers(self) -> list[dict[str, str]]:
        """Texts by name: prompt, reference, before, after."""
        found = self._parsed(ANSWERS, json.loads).get("answers")
        answers = [answer for answer in found if isinstance(answer, dict)] if isinstance(found, list) else []
        names = ("prompt", "reference", "before", "after")
        return [
            {name: str(answer[name])[:TEXT] for name in names if name in answer} for answer in answers[:MOST_ANSWERS]
        ]

    def _parsed(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        path = self.folder / name
        with contextlib.suppress(OSError, ValueError, RecursionError):
            changed = path.lstat().st_mtime
            if name not in self._files or changed != self._files[name][0]:
                self._files[name] = changed, {}
                value = parse(read_text(path))
                self._files[name] = changed, value if isinstance(value, dict) else {}
            return self._files[name][1]
        return {}

    def state(self) -> str:
        """running, finished, or stopped."""
        if self._is_locked():
            return "running"
        if (self.folder / "adapter" / "adapter_config.json").is_file():
            return "finished"
        with contextlib.suppress(OSError):
            if time.time() - (self.folder / METRICS).stat().st_mtime < RECENT:
                return "running"
        return "stopped"

    def _is_locked(self) -> bool:
        """Whether a job holds the run's lock (`run_lock`), asked without taking it."""
        form = "hhqqi4x"  # struct flock on 64-bit Linux
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            question = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
            return struct.unpack(form, answer)[0] != fcntl.F_UNLCK
        except OSError:
            return False
        finally:
            os.close(descriptor)


class Runs:
    """All runs in some folders, each a run directory or a parent of several; read in the background.

    Raises UserError where a folder does not exist.
    """

    def __init__(self, folders: list[Path]) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; name run directories, or folders that hold them")
        self.folders = [folder.resolve() for folder in folders]
        self._runs: dict[Path, Run] = {}
        self._stop = threading.Event()
        self._answering, self._answered = 0, 0.0  # requests now, and when the last one ended
        self.discover()

    def all(self) -> list[Run]:
        """By name."""
        return sorted(self._runs.values(), key=lambda run: run.name)

    def get(self, run_id: str) -> Run | None:
        """The run with an id."""
        return next((run for run in self._runs.values() if run.id == run_id), None)

    def discover(self) -> None:
        """Look for new runs, and forget those that are gone."""
        found: dict[Path, str] = {}
        for root in self.folders:
            for folder in _run_folders(root, DEPTH):
                found.setdefault(folder, folder.name if folder == root else folder.relative_to(root).as_posix())
        runs = {}
        for folder, name in list(found.items())[:MOST]:
            runs[folder] = self._runs.get(folder) or Run(folder, name)
            if folder not in self._runs:
                runs[folder].preview()
        self._runs = runs  # replaced as a whole: other threads iterate over it

    def advance(self) -> bool:
        """Read some of what is new in each run; returns whether anything was."""
        found = False
        for run in self.all():
            found = run.advance() or found
        return found

    def follow(self) -> None:
        """Read in a thread of its own until `stop`."""
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it the thread does not read: a request is answered by the same interpreter."""
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1
            self._answered = time.monotonic()

    def _follow(self) -> None:
        looked = time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - looked > 5:
                self.discover()
                looked = time.monotonic()
            new = False
            for run in self.all():
                waited = time.monotonic()
                while (self._answering or time.monotonic() - self._answered < PAUSE) and time.monotonic() - waited < 1:
                    self._stop.wait(0.02)  # a page asks several times in a row
                new = run.advance() or new
            self._stop.wait(0.005 if new else 0.5)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory; a checkpoint, which holds a config.toml too, is none."""
    return (folder / METRICS).is_file() or (
        (folder / CONFIG).is_file() and not (folder / "adapter_config.json").is_file()
    )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories in `folder` and below, symbolic links left out."""
    if is_run(folder):
        yield folder
        return
    if not depth:
        return
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _run_folders(Path(entry.path), depth - 1)
