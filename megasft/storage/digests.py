"""SHA-256 of files, cached between runs for large ones."""

import contextlib
import hashlib
import os
import socket
import time
from pathlib import Path

UNSETTLED_SECONDS = 3.0  # a file modified more recently may change again without a visible change of its timestamps


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(file: Path, root: Path) -> str:
    """SHA-256 of a file, cached under `root` until the file's size, timestamps, inode or device change."""
    cache = root / "digests"
    entry = cache / hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]
    before = _stat(file)
    with contextlib.suppress(OSError, ValueError):
        *cached, digest = entry.read_text().split()
        if cached == before:
            return digest
    started = time.time()
    digest = file_sha256(file)
    status = file.stat()
    if _stat(file) == before and max(status.st_mtime, status.st_ctime) < started - UNSETTLED_SECONDS:
        part = entry.with_name(f"{entry.name}.{socket.gethostname()}.{os.getpid()}")
        with contextlib.suppress(OSError):  # without an entry, the next run hashes the file again
            cache.mkdir(parents=True, exist_ok=True)
            part.write_text(" ".join([*before, digest]))
            part.replace(entry)
    return digest


def _stat(file: Path) -> list[str]:
    status = file.stat()
    return [
        str(value) for value in (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    ]
