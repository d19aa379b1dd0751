"""SHA-256 of files, of large ones remembered between runs."""

import contextlib
import hashlib
import os
import socket
import time
from pathlib import Path

UNSETTLED_SECONDS = 3.0  # a file written to so recently may change again without its times showing it


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(file: Path, root: Path) -> str:
    """SHA-256 of a file; remembered under `root` for as long as no time, size or number of the file changes."""
    notes = root / "digests"
    note = notes / hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]
    before = _stat(file)
    with contextlib.suppress(OSError, ValueError):
        *remembered, digest = note.read_text().split()
        if remembered == before:
            return digest
    started = time.time()
    digest = file_sha256(file)
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
