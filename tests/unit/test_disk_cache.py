"""Cache folders are built once, even on file systems without locks."""

import errno
import socket
from pathlib import Path

import pytest

from megasft.storage import disk_cache
from megasft.storage.disk_cache import make_once


def usable(folder: Path) -> str | None:
    file = folder / "file"
    return file.read_text() if file.exists() else None


def make(part: Path) -> None:
    (part / "file").write_text("whole")


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(disk_cache.fcntl, "flock", flock)


def test_without_locks_two_processes_can_build_the_same_folder(tmp_path, no_locks):
    folder = tmp_path / "key"

    def make_while_another_does(part: Path) -> None:
        assert make_once(folder, usable, make, "waiting") == "whole"
        make(part)

    assert make_once(folder, usable, make_while_another_does, "waiting") == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.lock"}


@pytest.mark.parametrize("key", ["key", "other"])
def test_leftovers_are_removed_under_a_lock(tmp_path, key):
    left = tmp_path / f"{key}.1-ab@{socket.gethostname()}.part"
    elsewhere = tmp_path / f"{key}.1-ab@another{socket.gethostname()}.part"
    for part in (left, elsewhere):
        part.mkdir()
    make_once(tmp_path / "key", usable, make, "waiting")
    assert not left.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("key", ["key", "other"])
def test_without_locks_leftovers_are_kept_because_they_may_be_in_use(tmp_path, key, no_locks):
    left = tmp_path / f"{key}.1-ab@{socket.gethostname()}.part"
    left.mkdir()
    make_once(tmp_path / "key", usable, make, "waiting")
    assert left.exists()
