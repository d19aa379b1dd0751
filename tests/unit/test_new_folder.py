"""A folder that is replaced is there at every moment, the old one or the new one."""

import ctypes
import os
import threading
from types import SimpleNamespace

import pytest

from megasft.storage.new_folder import NewFolder


def write(folder, text):
    with NewFolder(folder) as new:
        (new.path / "file").write_text(text)


def test_a_folder_that_is_replaced_is_never_absent(tmp_path):
    folder, missing, looks, done = tmp_path / "best", 0, 0, threading.Event()
    write(folder, "first")

    def look():
        nonlocal missing, looks
        while not done.is_set():
            looks += 1
            try:
                os.stat(folder / "file")
            except FileNotFoundError:
                missing += 1

    watcher = threading.Thread(target=look)
    watcher.start()
    for i in range(50):
        write(folder, str(i))
    done.set()
    watcher.join()
    assert missing == 0 < looks
    assert (folder / "file").read_text() == "49"
    assert os.listdir(tmp_path) == ["best"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_on_file_systems_that_cannot_exchange_names_too(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(renameat2=lambda *_: -1))
    for text in ("old", "new"):
        write(tmp_path / "best", text)
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["best"]
