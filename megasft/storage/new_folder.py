"""A folder that appears complete or not at all."""

import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from typing import Self

from megasft.messages import UserError


class NewFolder:
    """Builds a folder under a temporary name beside its final one: `with NewFolder(x) as new:`.

    Write files to `new.path` inside the block. The end of the block renames the folder to its final name; an exception
    deletes it. An existing folder is replaced. Raises UserError if the folder cannot be written, or if `replace` is
    false and the existing folder holds files.
    """

    def __init__(self, folder: str | Path, replace: bool = True) -> None:
        self.folder = Path(folder)
        if not replace:
            refuse_full(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder}: exists and is not a folder")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self.finish()
            return
        self.discard()
        if isinstance(error, OSError):
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: cannot be written ({error.strerror or error})")

    def finish(self) -> None:
        """Flush to disk and rename the folder to its final name."""
        try:
            for path in (*self.path.rglob("*"), self.path):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            self.path.chmod(0o755)
            if self.folder.exists():
                _exchange(self.path, self.folder)
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                self.path.rename(self.folder)
        except OSError as error:
            self.discard()
            raise self._failed(error) from None

    def discard(self) -> None:
        """Delete the unfinished folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def refuse_full(folder: str | Path) -> None:
    """Raise UserError if `folder` is a file, or a folder that holds something."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder}: exists and is not a folder")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{folder}: already holds files; name a folder that does not exist yet, or empty this one")


def _exchange(a: Path, b: Path) -> None:
    """Give two folders each other's name, in one step where the file system can (renameat2(2)). Raises OSError."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if ctypes.CDLL(None).renameat2(here, os.fsencode(a.absolute()), here, os.fsencode(b.absolute()), exchange):
        aside = a.with_name(a.name + ".old")
        b.rename(aside)
        a.rename(b)
        aside.rename(a)
