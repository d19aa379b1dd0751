"""The dashboard and the report as a reader sees and uses them, in a real Chromium."""

import json
import time

import pytest

from megasft.board.report import write_report
from tests.board.test_server import EVIL
from tests.support.made_runs import lines, make_run

DRAWN = "document.querySelectorAll('.plot canvas').length >= 3"
WIDE = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def address(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("runs")
    for number in range(3):
        run = make_run(folder / f"run-{number}", steps=300, seed=number, finished=number < 2)
        answer = {"prompt": "What is 1 + 1?", "before": "Hm.", "after": "2", "reference": "2."}
        (run / "answers.json").write_text(json.dumps({"answers": [answer]}))
    return serve(folder)


def until(page, expression):
    """Wait for it; playwright's own `wait_for_function` needs `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    until(page, f"document.querySelector('#{name.lower()}').children.length > 0")


def drawn_pixels(page, plot=0):
    """How many pixels of a plot are neither background nor grid: strongly coloured ones."""
    return page.evaluate(
        """(at) => { const canvas = document.querySelectorAll('.plot canvas')[at];
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data; let found = 0;
        for (let i = 0; i < data.length; i += 4) {
          const [r, g, b, a] = data.slice(i, i + 4); if (a > 99 && Math.max(r, g, b) - Math.min(r, g, b) > 60) found++;
        } return found; }""",
        plot,
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_shows_every_group_of_plots_with_curves_in_both_themes(visit, address, theme):
    page = visit(address, theme=theme)
    until(page, DRAWN)
    assert page.locator("#plots h2").all_inner_texts() == [
        "Quality",
        "Optimization",
        "Adapters",
        "Speed",
        "Devices",
        "Experts",
    ]
    assert drawn_pixels(page) > 300
    titles = page.locator(".plot .title").all_inner_texts()
    for title in (
        "Loss",
        "Token accuracy",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Step time",
        "GPU power, mean of ranks",
    ):
        assert title in titles
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (theme == "dark")
    for figure in page.locator(".plot").all():
        figure.scroll_into_view_if_needed()
        figure.locator("canvas").wait_for()
    for number in range(len(titles)):
        assert drawn_pixels(page, number) > 20, titles[number]


def test_every_view_has_what_it_is_for(visit, address):
    page = visit(address)
    until(page, DRAWN)
    tab(page, "Experts")
    until(page, "document.querySelector('.heat canvas')?.width === 32")
    assert "busiest: layer" in page.locator(".heat .hint").inner_text()
    before = page.locator(".heat output").inner_text()
    page.locator(".heat input").focus()
    page.keyboard.press("ArrowLeft")
    until(page, f"document.querySelector('.heat output').textContent !== '{before}'")
    tab(page, "Settings")
    rows = page.locator("#settings tbody tr")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == [
        "hyperparameters.learning_rate",
        "hyperparameters.max_steps",
    ]
    page.get_by_label("only what differs").uncheck()
    assert rows.count() > 5
    tab(page, "Events")
    page.get_by_label("Kind of event").select_option("loss_spike")
    assert page.locator("#events tbody tr").count() == 3
    tab(page, "Answers")
    assert "What is 1 + 1?" in page.locator("#answers").inner_text()


def test_runs_can_be_hidden_and_the_choice_outlives_a_reload(visit, address):
    page = visit(address)
    until(page, DRAWN)
    all_runs = drawn_pixels(page)
    page.get_by_label("Show run-1").uncheck()
    page.get_by_label("Show run-2").uncheck()
    until(page, "document.querySelector('#runs-count').textContent === '1 of 3 shown'")
    page.wait_for_timeout(300)
    assert drawn_pixels(page) < all_runs
    page.reload()
    until(page, "document.querySelector('#runs-count').textContent === '1 of 3 shown'")


def test_everything_can_be_done_with_the_keyboard(visit, address):
    page = visit(address)
    until(page, DRAWN)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Experts").get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowLeft")
    figure = page.locator(".plot").first
    figure.focus()
    page.keyboard.press("End")
    assert figure.locator(".tip b").inner_text() == "step 300"
    page.keyboard.press("ArrowLeft")
    assert figure.locator(".tip b").inner_text() == "step 299"
    assert "run-0 train" in figure.locator(".read").text_content()
    page.keyboard.press("+")
    page.get_by_role("button", name="Reset zoom").wait_for()
    page.keyboard.press("0")
    until(page, "document.querySelector('#reset').hidden")
    page.keyboard.press("l")
    assert figure.get_by_role("button").get_attribute("aria-pressed") == "true"


def test_dragging_zooms_all_plots_and_pointing_shows_values(visit, address):
    page = visit(address)
    until(page, DRAWN)
    box = page.locator(".plot .u-over").first.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 60, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Reset zoom").wait_for()
    page.mouse.move(box["x"] + 160, box["y"] + 60)
    assert page.locator(".plot .tip").first.inner_text().startswith("step ")
    page.get_by_role("button", name="Reset zoom").click()


def test_a_running_job_is_followed_and_only_what_is_new_is_sent(visit, serve, tmp_path):
    run = make_run(tmp_path / "live", steps=2000, finished=False)
    page = visit(serve(tmp_path))
    until(page, DRAWN)
    until(page, "document.querySelector('.facts').textContent.includes('step 2,000 / 4,000')")
    page.wait_for_timeout(2500)
    sent = []
    page.on("response", lambda answer: sent.append((answer.url, int(answer.headers.get("content-length", 0)))))
    record = [line for line in lines(2000, epochs=0.5) if line["kind"] == "train"][-1]
    with open(run / "metrics.jsonl", "a") as file:
        for step in range(2001, 2011):
            file.write(json.dumps(record | {"step": step, "time": record["time"] + step - 2000}) + "\n")
    until(page, "document.querySelector('.facts').textContent.includes('step 2,010 / 4,000')")
    page.wait_for_timeout(1000)
    figure = page.locator(".plot").first
    figure.focus()
    page.keyboard.press("End")
    assert figure.locator(".tip b").inner_text() == "step 2,010"
    curves = [size for url, size in sent if "/api/curves" in url]
    assert curves
    assert max(curves) < 3000  # a whole answer has 480 points a curve


def test_a_run_that_starts_later_shows_up(visit, serve, tmp_path):
    (tmp_path / "runs").mkdir()
    page = visit(serve(tmp_path / "runs"))
    page.get_by_text("No run yet in").wait_for()
    make_run(tmp_path / "runs" / "late", steps=20)
    page.get_by_role("button", name="late").wait_for()
    until(page, DRAWN)
    assert not page.get_by_text("No run yet in").is_visible()


def test_the_page_says_when_the_server_is_gone(chromium, tmp_path):
    from tests.browser.conftest import serving

    make_run(tmp_path / "run", steps=20)
    with serving(tmp_path) as address:
        page = chromium.new_page()
        page.goto(address)
        page.get_by_text("nothing runs").or_(page.get_by_text("1 running")).first.wait_for()
    page.get_by_text("no connection").wait_for()
    page.close()


def test_a_phone_has_one_column_and_nothing_beside_the_screen(visit, address):
    page = visit(address, width=390, height=844, has_touch=True, is_mobile=True)
    until(page, "document.querySelectorAll('.plot canvas').length >= 2")
    assert not page.evaluate(WIDE)
    left = {round(figure.bounding_box()["x"]) for figure in page.locator(".plot").all()[:6]}
    assert len(left) == 1
    assert not page.locator("#runs").is_visible()
    page.locator("summary").tap()
    assert page.locator("#runs").is_visible()
    for name in ("Experts", "Settings", "Events", "Answers"):
        tab(page, name)
        assert not page.evaluate(WIDE), name


def test_the_theme_can_be_chosen_and_is_kept(visit, address):
    page = visit(address)
    page.get_by_role("button", name="theme: auto").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.get_by_role("button", name="theme: dark").wait_for()


def test_markup_in_names_tags_events_and_answers_is_shown_as_text(visit, serve, tmp_path):
    run = make_run(tmp_path / "runs" / EVIL.replace("/", "\u2215"), steps=40)
    make_run(tmp_path / "runs" / "other", steps=40, seed=1)
    text = json.dumps(EVIL)
    (run / "config.toml").write_text(f"[tags]\n{text} = {text}\n")
    (run / "answers.json").write_text(
        json.dumps({"answers": [dict.fromkeys(("prompt", "before", "after", "reference"), EVIL)]})
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", "step": 41, "time": 1.8e9, "event": EVIL, "reason": EVIL}) + "\n")
        file.write(
            json.dumps({"kind": "norms", "step": 41, "time": 1.8e9, "parameters": {"lora_A": {EVIL: 1.0}}}) + "\n"
        )
    page = visit(serve(tmp_path / "runs"))
    page.get_by_role("button", name="<img").click()
    until(page, DRAWN)
    page.locator(".plot", has_text="Norm of A").scroll_into_view_if_needed()
    page.locator(".keys", has_text="<img").first.wait_for()
    for name in ("Experts", "Settings", "Events", "Answers"):
        tab(page, name)
        page.locator(f"#{name.lower()}", has_text="<img src=x onerror=alert(1)>").wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("document.querySelectorAll('img, script:not([src]), iframe').length") == 0
    report = visit(f"file://{write_report(run, tmp_path / 'report.html')}")
    assert report.evaluate("document.querySelectorAll('script, img:not(.load)').length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_report_is_readable_on_a_screen_and_on_a_phone(visit, tmp_path, theme):
    path = write_report(make_run(tmp_path / "run", steps=200))
    for width in (1200, 390):
        page = visit(f"file://{path}", width=width, theme=theme)
        assert not page.evaluate(WIDE)
        assert page.locator("figure svg[role=img]").count() > 15
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        assert contrast(ink, paper) > 7  # WCAG's AAA


def contrast(one: str, other: str) -> float:
    """Of two colours `rgb(r, g, b)`, by WCAG 2."""
    shares = []
    for text in (one, other):
        values = [int(value) / 255 for value in text.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        shares.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(shares) + 0.05) / (min(shares) + 0.05)


def test_the_first_plots_of_long_runs_are_there_at_once(visit, serve, tmp_path):
    """Five runs of 20,000 steps; benchmarks/dashboard.py has twenty of 100,000."""
    import shutil

    make_run(tmp_path / "runs" / "run-0", steps=20_000)
    for number in range(1, 5):
        shutil.copytree(tmp_path / "runs" / "run-0", tmp_path / "runs" / f"run-{number}")
    address = serve(tmp_path / "runs")
    started = time.monotonic()
    page = visit(address)
    until(page, DRAWN)
    assert time.monotonic() - started < 10  # 1 to 2 s where nothing else runs
