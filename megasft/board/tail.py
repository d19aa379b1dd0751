"""New lines of a file that another process appends to, and at times truncates."""

import os
import stat
from pathlib import Path

BLOCK = 1 << 18  # bytes read at a time
LONGEST = 1 << 20  # bytes of a line or a text
MARK = 64  # bytes before the place reached, by which a file that was truncated and has grown again is recognized


class Tail:
    """Reads what was appended since the last call; a last line without its end waits for the next.

    Attributes:
        offset: bytes of complete lines read.
        size: of the file at the last read.
        restarts: how often the file was found truncated or replaced, and is read from its start again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.size, self.restarts = path, 0, 0, 0
        self._mark = b""

    def read(self, limit: int = BLOCK) -> list[bytes]:
        """At most `limit` bytes of complete lines; [] where there are none, or no regular file."""
        try:
            descriptor = open_regular(self.path)
        except OSError:
            return []
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            self.size = os.fstat(descriptor).st_size
            if self.offset and not self._continues(descriptor):
                self.offset, self._mark = 0, b""
                self.restarts += 1
            file.seek(self.offset)
            data = file.read(limit)
            if b"\n" not in data and len(data) == limit:
                data += file.read(LONGEST - limit)
        end = data.rfind(b"\n") + 1
        if not end and len(data) >= LONGEST:  # no record is that long: skip it
            end = len(data)
        self.offset += end
        self._mark = (self._mark + data[:end])[-MARK:]
        return data[:end].splitlines()

    def _continues(self, descriptor: int) -> bool:
        if self.size < self.offset:
            return False
        return os.pread(descriptor, len(self._mark), self.offset - len(self._mark)) == self._mark


def skim(path: Path, lines: int) -> list[bytes]:
    """About so many complete lines, evenly spaced over a file and including its last ones."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return []
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        found: list[bytes] = []
        for number in range(lines):
            file.seek(size * number // lines)
            parts = file.read(4096).split(b"\n")
            found += parts[1:2] if number else parts[:1]
        file.seek(max(0, size - 16384))
        found += file.read().split(b"\n")[1:-1]
    return found


def open_regular(path: Path) -> int:
    """A descriptor of a regular file for reading. Raises OSError for anything else, and where a part of the path is a
    symbolic link.
    """
    if path.parent.resolve() != path.parent:
        raise OSError(f"{path}: a folder of it is a symbolic link")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: not a regular file")
    return descriptor


def read_text(path: Path, limit: int = LONGEST) -> str:
    """The text of a regular file, at most `limit` bytes; "" where it cannot be read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(limit).decode("utf-8", errors="replace")
    except OSError:
        return ""
