"""One job in an output folder at a time."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from megasft.messages import UserError, say

NAME = ".lock"
WAIT_SECONDS = 60.0  # ranks of an earlier attempt, or of a job that is being stopped, may take this long to end

_held: dict[Path, int] = {}


def hold(output_dir: str | Path) -> None:
    """Lock the folder until this process ends; raises UserError if another process holds it.

    The lock is POSIX's (fcntl, F_SETLK): the kernel releases it when the process ends, however it ends, and children do
    not inherit it. On NFS it works across nodes (version 4 by itself, version 3 where lockd runs) unless mounted with
    nolock or local_lock; the lock of a node that dies is released when its lease expires (version 4, a minute or two)
    or when it is up again (version 3). On a file system without locks this warns and continues.
    """
    folder = Path(output_dir).resolve()
    if folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never opened again in this process: closing any descriptor of the file would release the lock.
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"[job] output_dir: {output_dir} cannot be written ({error.strerror})") from None
    if _lock(file, folder):
        with contextlib.suppress(OSError):  # a full disk; the name is for those who are refused
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[folder] = file


def refuse_second(output_dir: str | Path) -> None:
    """`hold`, if a job has locked the folder before; creates nothing otherwise."""
    if (Path(output_dir) / NAME).exists():
        hold(output_dir)


def release(output_dir: str | Path) -> None:
    """Release the folder."""
    file = _held.pop(Path(output_dir).resolve(), None)
    if file is not None:
        os.close(file)


def _lock(file: int, folder: Path) -> bool:
    """Take the lock, waiting for it; false where the file system has none. Raises UserError."""
    deadline, waited = time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the file system likes
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        except OSError as error:
            say(f"{folder / NAME}: cannot be locked ({error.strerror}); make sure that no other job writes there")
            return False
        if time.monotonic() > deadline:
            os.close(file)
            raise UserError(
                f"[job] output_dir = {str(folder)!r}: {holder} is training into it; wait for that job, end it, or name "
                "another folder"
            )
        if not waited:
            say(f"{folder}: {holder} is training into it; waiting up to {WAIT_SECONDS:.0f} s for it to end")
        waited = True
        time.sleep(0.5)
