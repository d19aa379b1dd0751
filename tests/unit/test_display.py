"""A run on the terminal: the live view, the lines above it, and the terminal as it was afterwards; or plain lines for logs."""

import io
import re

import pytest
from rich.console import Console

from megasft.train import display
from megasft.train.display import Lines, Live, View, describe, open_display, sparkline

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
        ("validation", {"loss": 2.0, "tokens": 9, "token_accuracy": 0.5}, "validation loss 2.0000 over 9 tokens, 50.0% predicted right"),
        ("validation", {"loss": None, "tokens": 1234}, "validation loss not finite over 1,234 tokens"),
        ("checkpoint", SAVED, f"checkpoint written to {SAVED['path']}"),
        ("event", {"event": "loss_spike", "reason": "x"}, "loss spike: x"),
    ],
)  # fmt: skip
def test_a_record_in_words_has_its_numbers(kind, values, words):
    assert describe(kind, values) == words


def test_the_view_stands_below_its_history_and_shows_how_the_run_is(terminal, clock):
    view = Live(100, 2, terminal)
    view.show("validation", 2, {"loss": 3.5, "tokens": 1234})
    view.show("train", 3, TRAIN)
    view.show("checkpoint", 3, SAVED)
    for number in (1, 2, 3):
        view.show("event", 3, {"event": "slow_throughput", "reason": f"reason {number}"})
    measured = {"mfu": 0.4321, "rss": 3 * 10**9, "memory_peak": 4 * 10**9, "seconds": 2.0, "data_wait": 0.5}
    view.show("train", 4, TRAIN | measured | {"loss": 7.0})  # no line: the last one is not long ago
    view._progress.refresh()
    lines = shown(terminal).splitlines()
    assert lines[:6] == [
        "step 2/100: validation loss 3.5000 over 1,234 tokens",
        f"step 3/100: {describe('train', TRAIN)}",
        f"step 3/100: checkpoint written to {SAVED['path']}",
        *(f"step 3/100: slow throughput: reason {number}" for number in (1, 2, 3)),
    ]
    assert re.match(r"training .* 4/100 ", lines[6])
    assert lines[7:] == [
        "loss 7.0000 \u2581\u2588  validation 3.5000 (step 2)  lr 5.00e-06  grad norm 0.750",
        "12,346 tokens/s  MFU 43.2%  memory 3.0 GB, at most 4.0 GB  waits 25% for data",
        "step 3: slow throughput: reason 2",
        "step 3: slow throughput: reason 3",
    ]
    view.close()


def test_a_narrow_terminal_cuts_the_lines_of_the_view_and_wraps_none(clock):
    narrow = Console(
        file=io.StringIO(), force_terminal=True, width=40, height=30, color_system=None, legacy_windows=False
    )
    view = Live(100, 0, narrow)
    view.show("train", 1, TRAIN)
    view.show("event", 1, {"event": "loss_spike", "reason": "of many words " * 9})
    view._progress.refresh()
    *_, speed, event = shown(narrow).splitlines()
    assert (speed, len(event), event[-1]) == ("12,346 tokens/s", 40, "\u2026")
    view.close()


def test_the_sparkline_goes_from_the_lowest_to_the_highest_in_equal_shares():
    assert sparkline([]) == sparkline([1.0]) == ""
    assert sparkline([2.0, 2.0]) == "\u2581\u2581"
    assert sparkline([1.0, 8.0, 4.5]) == "\u2581\u2588\u2585"
    falling = sparkline([1000.0 - i for i in range(1000)])
    assert len(falling) == display.SPARKS
    assert falling[0] == "\u2588"
    assert falling[-1] == "\u2581"
    assert list(falling) == sorted(falling, reverse=True)


def test_a_view_without_steps_has_the_events_alone():
    view = View()
    view.see("event", 0, {"event": "resumed", "reason": "from x"})
    assert view.lines() == ["step 0: resumed: from x"]
    view.see("train", 1, TRAIN | {"loss": None, "grad_norm": None})
    assert view.lines()[0].startswith("skipped")


def test_the_view_keeps_a_line_of_the_loss_every_few_seconds_and_of_the_last_step(terminal, clock):
    view = Live(8, 0, terminal)
    for step in range(1, 9):
        view.show("train", step, TRAIN | {"loss": float(step)})
        clock.now += display.LINE_SECONDS / 2 + 0.01
    view.close()
    lines = re.findall(r"step (\d)/8: loss (\d)\.0000", shown(terminal))
    assert lines == [(step, step) for step in "13578"]


def test_afterwards_the_view_is_gone_and_the_cursor_is_back(terminal, clock):
    view = Live(100, 0, terminal)
    assert terminal.file.getvalue().endswith(HIDE) or HIDE in terminal.file.getvalue()
    view.show("train", 1, TRAIN)
    view.close()
    view.close()
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


def test_a_terminal_gets_the_view_and_anything_else_the_lines(monkeypatch, capsys):
    assert isinstance(open_display(10, 0), Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    view = open_display(10, 0)
    view.close()
    assert isinstance(view, Live)
