"""The pictures of docs/: python -m tests.browser.screenshots RUNS. Takes them of a dashboard of the runs in a folder."""

import argparse
from pathlib import Path

from megasft.board.report import write_report
from megasft.board.run_folder import Runs
from tests.browser.conftest import find_chromium, serving

OUT = Path(__file__).parents[2] / "docs" / "images"
# name, theme, width, height, what the address says
SHOTS = [
    ("dashboard-light", "light", 1400, 860, "tab=curves&smooth=0.6"),
    ("dashboard-dark", "dark", 1400, 860, "tab=curves&smooth=0.6"),
    ("dashboard-phone", "light", 390, 844, "tab=curves&smooth=0.6"),
    ("dashboard-experts", "dark", 1100, 420, "tab=experts"),
    ("dashboard-settings", "light", 1100, 420, "tab=settings"),
]


def main() -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    folder: Path = parser.parse_args().runs
    report = write_report(Runs([folder]).all()[-1].folder, folder / "report.html")
    OUT.mkdir(exist_ok=True)
    with serving(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        shots = [(*shot[:4], f"{address}#{shot[4]}") for shot in SHOTS]
        shots.append(("report", "light", 1100, 900, f"file://{report.resolve()}"))
        for name, theme, width, height, url in shots:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto(url)
            page.wait_for_timeout(2500)
            path = OUT / f"{name}.png"
            page.screenshot(path=path)
            # 256 colours: half of the bytes, and no difference to be seen.
            Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
