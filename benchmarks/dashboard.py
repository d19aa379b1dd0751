"""How fast the dashboard shows many long runs, and how much memory it takes.

Writes runs of so many steps with a `train` line each, starts `megasft dashboard`, and opens it in Chromium
(`make test-browser` installs what drives it). Prints the time from the request to the first plot with curves, what the
page sends then and later, and the memory of server and page while all lines are read, and while one run grows.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Page, Response, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.made_runs import make_run  # noqa: E402

MIB = 2**20
LIST = "fetch('/api/runs').then((answer) => answer.json())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use those that are there")
    parser.add_argument("--grow-seconds", type=int, default=60, help="how long one run grows at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        write_runs(folder, arguments.runs, arguments.steps)
        command = [sys.executable, "-m", "megasft", "dashboard", str(folder), "--port", "0"]
        started = time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as server:
            assert server.stderr is not None
            try:
                line = server.stderr.readline()
                print(f"server ready after {time.monotonic() - started:.2f} s (imports and a glance at each file)")
                address = re.search(r"http://\S+", line)
                assert address, line
                measure(address[0], folder, server, arguments.browser, arguments.grow_seconds)
            finally:
                server.terminate()


def write_runs(folder: Path, runs: int, steps: int) -> None:
    """Made runs; one is made, the others are copies of it."""
    first = folder / "run-00"
    if not first.is_dir():
        make_run(first, steps, experts=128)
    for number in range(1, runs):
        if not (copy := folder / f"run-{number:02d}").is_dir():
            shutil.copytree(first, copy)
    size = sum(path.stat().st_size for path in folder.glob("*/metrics.jsonl"))
    load = os.getloadavg()[0]
    print(f"{runs} runs of {steps:,} steps, {size / 1e9:.2f} GB; load {load:.1f} on {os.cpu_count()} cores")


def measure(url: str, folder: Path, server: Any, browser: str, grow_seconds: int) -> None:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--enable-precise-memory-info"]
        chromium = playwright.chromium.launch(executable_path=browser, args=options)
        visit(chromium, url, "first visit, while the server reads").close()
        page = visit(chromium, url, "second visit")
        print(f"while it reads: {memory(server, page)}")
        started = time.monotonic()
        while any(run["read"] < 1 for run in page.evaluate(LIST)["runs"]):
            time.sleep(2)
        print(f"all lines read {time.monotonic() - started:.0f} s later: {memory(server, page)}")
        visit(chromium, url, "visit when all is read").close()
        sent = Counted(page)
        grow(folder / "run-00" / "metrics.jsonl", grow_seconds, page)
        rate = sent.bytes / 1024 / grow_seconds
        print(f"one run grew for {grow_seconds} s: {memory(server, page)}, {rate:.1f} KiB/s sent")
        chromium.close()


class Counted:
    """Counts the bytes that a page receives."""

    def __init__(self, page: Page) -> None:
        self.bytes = 0
        page.on("response", self._add)

    def _add(self, answer: Response) -> None:
        self.bytes += int(answer.headers.get("content-length", 0))


def visit(chromium: Browser, url: str, name: str) -> Page:
    """Open the page, and print when the plots on the screen had their curves."""
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    sent, started = Counted(page), time.monotonic()
    page.goto(url)
    while not page.evaluate("document.querySelectorAll('.plot canvas').length >= 4"):
        time.sleep(0.02)
    print(f"{name}: first plots after {time.monotonic() - started:.2f} s, {sent.bytes / MIB:.2f} MiB sent")
    return page


def grow(path: Path, seconds: int, page: Page) -> None:
    """Append lines like the last one, 20 a second."""
    last = [line for line in path.read_bytes()[-200_000:].splitlines() if line.startswith(b'{"kind": "train"')][-1]
    record = json.loads(last)
    with open(path, "a", encoding="utf-8") as file:
        for _ in range(20 * seconds):
            record |= {"step": record["step"] + 1, "time": record["time"] + 1}
            file.write(json.dumps(record) + "\n")
            file.flush()
            page.wait_for_timeout(50)  # in which what the page received is counted


def memory(server: Any, page: Page) -> str:
    heap = page.evaluate("performance.memory.usedJSHeapSize") / MIB
    return f"server {psutil.Process(server.pid).memory_info().rss / MIB:.0f} MiB, page {heap:.0f} MiB of JavaScript"


if __name__ == "__main__":
    main()
