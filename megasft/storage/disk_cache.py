"""Folders on disk that are made once for a key and used by every run after, and by which key: the content of files.

A folder gets its name when all that is in it is on the disk, so one that is there is whole. Whoever makes one holds the
lock beside it; the kernel takes that from a process that ends, however it ends.
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
    """What `usable(folder)` finds there; if that is None, after `make` has filled a folder that takes its name.

    A folder that is there and not usable is replaced. `waiting` is said where another process is at it already. Raises
    OSError.
    """
    found = usable(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock"), waiting) as locked:
        found = usable(folder)  # another may have made it meanwhile
        if found is None:
            if locked:
                _remove_leftovers(folder)
            _make(folder, usable, make)
            found = usable(folder)
    assert found is not None
    return found


@contextlib.contextmanager
def _lock(file: Path, waiting: str) -> Iterator[bool]:
    """Hold the lock; false on a file system without locks, where whoever is done first gives the folder its name."""
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
    """Fill a folder beside where it belongs, and move it there."""
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
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        part.rename(folder)
    except OSError:
        if usable(folder) is None:
            raise
        shutil.rmtree(part)  # on another host, without a lock between us, somebody was faster


def _remove_leftovers(folder: Path) -> None:
    """Delete what runs on this host have left that were killed while they wrote; we hold the lock of `folder`."""
    for part in folder.parent.glob(f"*@{socket.gethostname()}.part"):
        key = part.name.partition(".")[0]
        if key == folder.name:
            shutil.rmtree(part, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), part.with_name(f"{key}.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)
