"""The system's Chromium, driven by playwright, and a dashboard to look at."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


def find_chromium() -> str:
    """The browser's path: $CHROMIUM, or one that is installed."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "no Chromium: apt-get install chromium, or set CHROMIUM to the path of one"
    return found


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def is_wrong(message: Any) -> bool:
    """Whether a line of the console says that something is wrong; a test that reads pixels is told how to be faster."""
    return message.type in ("error", "warning") and "willReadFrequently" not in message.text


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a dashboard of these runs."""
    command = [sys.executable, "-m", "megasft", "dashboard", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", server.stderr.readline())[0]
    finally:
        server.kill()
        server.communicate(timeout=20)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Path], str]]:
    """`serve(folder)`: the address of a dashboard, which ends with the session."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(serving(folder))


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    """`visit(address, ...)`: a page; after the test nothing may have gone wrong in it, nor been asked of another host."""
    contexts, wrong = [], []

    def make(address: str, width: int = 1400, height: int = 900, theme: str = "light", **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        origin = re.match(r"(http://[^/]+/|file://)", address)[0]
        page.on(
            "request", lambda request: None if request.url.startswith((origin, "data:")) else wrong.append(request.url)
        )
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == []
