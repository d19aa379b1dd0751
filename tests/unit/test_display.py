"""A run on the terminal: the bar, the lines above it, and the terminal as it was afterwards; or plain lines for logs."""

import io
import re

import pytest
from rich.console import Console

from megasft.train import display
from megasft.train.display import Bar, Lines, describe, open_display

TRAIN = {"loss": 1.23456, "lr": 5e-6, "grad_norm": 0.75, "tokens_per_second": 12345.6}
SAVED = {"path": "runs/[red]a[/red]/checkpoints/step-000003"}
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def clock(monkeypatch):
    """The display's clock, which stands until it is set on."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


@pytest.fixture
def terminal():
    return Console(
        file=io.StringIO(), force_terminal=True, width=120, height=30, color_system=None, legacy_windows=False
    )


def shown(terminal: Console) -> str:
    """What is left on the terminal: lines as they were drawn over, the cursor's commands carried out."""
    lines, row, column = [""], 0, 0
    text = re.sub(r"\x1b\[\?25[lh]|\x1b\[[\d;]*m", "", terminal.file.getvalue())
    for part in re.findall(r"\x1b\[1A|\x1b\[2K|\r|\n|[^\x1b\r\n]+", text):
        if part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row], column = "", 0
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in lines).strip("\n")


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("train", TRAIN, "loss 1.2346  lr 5.00e-06  grad norm 0.750  12,346 tokens/s"),
        ("train", TRAIN | {"loss": None, "grad_norm": None}, "skipped: loss or gradient is not finite"),
        ("validation", {"loss": 2.0, "tokens": 1234}, "validation loss 2.0000 over 1,234 tokens"),
        ("validation", {"loss": None, "tokens": 1234}, "validation loss not finite over 1,234 tokens"),
        ("checkpoint", SAVED, f"checkpoint written to {SAVED['path']}"),
        ("event", {"event": "skipped", "reason": "x"}, "event: event skipped  reason x"),
    ],
)  # fmt: skip
def test_a_record_in_words_has_its_numbers(kind, values, words):
    assert describe(kind, values) == words


def test_the_bar_stands_below_its_history_and_shows_the_last_step(terminal, clock):
    bar = Bar(100, 2, terminal)
    bar.show("train", 3, TRAIN)
    bar.show("checkpoint", 3, SAVED)
    bar.show("train", 4, TRAIN | {"loss": 7.0})  # no line: the last one is not long ago
    bar._progress.refresh()
    *history, last = shown(terminal).splitlines()
    assert history == [f"step 3/100: {describe('train', TRAIN)}", f"step 3/100: checkpoint written to {SAVED['path']}"]
    assert re.match(r"training .* 4/100 ", last)
    assert "loss 7.0000" in last
    bar.close()


def test_the_bar_keeps_a_line_of_the_loss_every_few_seconds_and_of_the_last_step(terminal, clock):
    bar = Bar(8, 0, terminal)
    for step in range(1, 9):
        bar.show("train", step, TRAIN | {"loss": float(step)})
        clock.now += display.LINE_SECONDS / 2 + 0.01
    bar.close()
    lines = re.findall(r"step (\d)/8: loss (\d)\.0000", shown(terminal))
    assert lines == [(step, step) for step in "13578"]


def test_afterwards_the_bar_is_gone_and_the_cursor_is_back(terminal, clock):
    bar = Bar(100, 0, terminal)
    assert terminal.file.getvalue().endswith(HIDE) or HIDE in terminal.file.getvalue()
    bar.show("train", 1, TRAIN)
    bar.close()
    bar.close()
    text = terminal.file.getvalue()
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert shown(terminal) == f"step 1/100: {describe('train', TRAIN)}"


def test_lines_for_a_log_come_every_few_seconds_with_the_time_left(capsys, clock):
    lines = Lines(20)
    for step in range(11, 21):  # resumed after step 10
        clock.now += 2.0
        lines.show("train", step, TRAIN)
        if step == 12:
            lines.show("validation", step, {"loss": 2.0, "tokens": 5})
    lines.close()
    found = capsys.readouterr().err.splitlines()
    words = describe("train", TRAIN)
    assert found == [
        f"step 11/20: {words}  18 s left",
        "step 12/20: validation loss 2.0000 over 5 tokens",
        f"step 14/20: {words}  12 s left",
        f"step 17/20: {words}  6 s left",
        f"step 20/20: {words}  0 s left",
    ]


def test_a_terminal_gets_the_bar_and_anything_else_the_lines(monkeypatch, capsys):
    assert isinstance(open_display(10, 0), Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = open_display(10, 0)
    bar.close()
    assert isinstance(bar, Bar)
