"""Cache folders on disk: one process builds a folder for its key, and every later run uses it.

A folder gets its final name only after its files are flushed to disk, so a folder with that name is complete. The
process that builds it holds a lock file beside it, which the kernel releases when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from megasft.messages import say_once


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/megasft`, or `~/.cache/megasft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasft"


def make_once[T](
    folder: Path, usable: Callable[[Path], T | None], make: Callable[[Path], None], waiting: str
) -> T:  # fmt: skip
    """Return `usable(folder)`; if that is None, build the folder with `make` first.

    An existing folder that is not usable is replaced. If another process is building it, print `waiting` and wait.
    Raises OSError.
    """
    found = usable(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock"), waiting) as locked:
        found = usable(folder)  # another process may have built it meanwhile
        if found is None:
            if locked:
                _remove_leftovers(folder)
            _make(folder, usable, make)
            found = usable(folder)
    assert found is not None
    return found


@contextlib.contextmanager
def _lock(file: Path, waiting: str) -> Iterator[bool]:
    """Hold the lock, and yield whether it is held.

    It is not on a file system without locks, where the process that finishes first names the folder.
    """
    locked = True
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_once(waiting)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


def _make[T](folder: Path, usable: Callable[[Path], T | None], make: Callable[[Path], None]) -> None:
    """Build the folder under a temporary name beside its final one, then rename it."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}.part")
    part.mkdir()
    try:
        make(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for path in part.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if usable(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # incomplete, or of another key
    try:
        part.rename(folder)
    except OSError:
        if usable(folder) is None:
            raise
        shutil.rmtree(part)  # a process on another host, with no lock between the two, finished first


def _remove_leftovers(folder: Path) -> None:
    """Delete unfinished folders of killed runs on this host. The caller holds the lock of `folder`."""
    for part in folder.parent.glob(f"*@{socket.gethostname()}.part"):
        key = part.name.partition(".")[0]
        if key == folder.name:
            shutil.rmtree(part, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), part.with_name(f"{key}.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)
