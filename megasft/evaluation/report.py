"""An evaluation as a table, as JSON, and as a line for each conversation."""

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megasft.config.measures import SCORES
from megasft.evaluation.evaluate import Evaluation, Metric, Side
from megasft.evaluation.losses import LOSS, RIGHT, TOKENS
from megasft.messages import UserError

TURNS = 8  # of which the table has rows


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All metrics with their differences; JSON can hold it."""
    task = evaluation.task
    found: dict[str, Any] = {
        "data": task.data,
        "conversations": len(task.held_out.conversations),
        "skipped": task.held_out.account.problems,
        "overlong": {key: task.held_out.account.counts.get(key, 0) for key in ("truncated", "split", "dropped")},
    }
    if task.questions is not None:
        found |= {"answered_conversations": len(task.questions.chosen), "answered_turns": len(task.questions.asked)}
        found["unanswered_turns"] = task.questions.left_out
        found |= {"tool_call_format": task.questions.format, "max_new_tokens": task.max_new_tokens}
    found["metrics"] = {name: _metric(metric) for name, metric in evaluation.metrics.items()}
    return found


def _metric(metric: Metric) -> dict[str, Any]:
    values: dict[str, Any] = {side: _finite(metric.value(side)) for side in metric.sums} | {"count": metric.count}
    if (found := metric.difference) is not None:
        values |= {"difference": _finite(found.value), "low": _finite(found.low), "high": _finite(found.high)}
    return values


def print_table(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print base, adapter, and the difference with its interval. No number is cut, however narrow the terminal is."""
    task, metrics = evaluation.task, evaluation.metrics
    both = len(evaluation.sides) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("of", *evaluation.sides, *(("difference", "95% interval") if both else ())):
        table.add_column(name, justify="right", no_wrap=True)
    split = "tool_call/loss" in metrics  # otherwise all is text
    turns = [name for name in metrics if name.startswith("turn_")]
    several = len(turns) > 2
    hidden = {name for name in turns if not several or _turn(name) > TURNS}
    hidden |= set() if split else {name for name in metrics if name.startswith("text/")}
    shown = [name for name in metrics if name not in hidden]
    for name in shown:
        if name in SCORES and name == next(one for one in shown if one in SCORES):
            table.add_section()
        table.add_row(*_row(name, metrics[name], both))
    console = console or Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    lines = [f"{task.data}: {len(task.held_out.conversations):,} conversations"]
    if task.questions is not None:
        asked = f"{len(task.questions.asked):,} turns of {len(task.questions.chosen):,} conversations"
        lines.append(f"answers: {asked}, greedy, with the true history, at most {task.max_new_tokens} tokens")
    later = len([name for name in turns if several and _turn(name) > TURNS]) // 2
    lines += [f"{later:,} later turns are in --json"] if later else []
    lines += ["pp: percentage points; interval: paired bootstrap over conversations"] if both else []
    console.print(lines[0], soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for line in lines[1:]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _turn(name: str) -> int:
    return int(name.partition("/")[0].removeprefix("turn_"))


def _row(name: str, metric: Metric, both: bool) -> list[str]:
    title = name.replace("_", " ").replace("/", ": ")
    row = [title, f"{metric.count:,}", *(_shown(name, metric.value(side)) for side in metric.sums)]
    if both and (found := metric.difference) is not None:
        ends = [_shown(name, end, "+") for end in (found.low, found.high)]
        row += [_shown(name, found.value, "+"), " to ".join(ends) if all(ends) else ""]
    return row


def _shown(name: str, value: float, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    if name.endswith("loss"):
        return f"{value:{sign}.4f}"
    if name.endswith("perplexity"):
        return f"{value:{sign}.2f}"
    return f"{100 * value:{sign}.1f}{' pp' if sign else '%'}"


def write_lines(evaluation: Evaluation, path: Path) -> None:
    """Write a JSON line for each conversation. Raises UserError."""
    try:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(evaluation))
        path.write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None


def _lines(evaluation: Evaluation) -> list[dict[str, Any]]:
    task = evaluation.task
    lines: list[dict[str, Any]] = []
    for number, place in enumerate(task.held_out.conversations):
        sides = {name: _losses(side, number) for name, side in evaluation.sides.items()}
        lines.append({"file": str(task.held_out.files[place.file]), "line": place.line, **sides})
    for i, question in enumerate(task.questions.asked if task.questions else []):
        answers = {name: _answer(side, i) for name, side in evaluation.sides.items()}
        answer = {"turn": question.turn + 1, "reference": question.text, **answers}
        lines[question.conversation].setdefault("answers", []).append(answer)
    return lines


def _losses(side: Side, number: int) -> dict[str, Any]:
    """Of one conversation: of all its supervised tokens, and of each turn."""
    parts = side.losses[number]
    turns = [(i // 2 + 1, parts[i : i + 2].sum(0)) for i in range(0, len(parts), 2)]
    return _means(parts.sum(0)) | {"turns": [{"turn": turn} | _means(sums) for turn, sums in turns if sums[TOKENS]]}


def _means(sums: Any) -> dict[str, Any]:
    tokens = int(sums[TOKENS])
    return {"loss": _finite(sums[LOSS] / tokens), "token_accuracy": _finite(sums[RIGHT] / tokens), "tokens": tokens}


def _answer(side: Side, number: int) -> dict[str, Any]:
    answer = side.answers[number]
    scores = {name: share.right / share.all for name, share in answer.scores.items() if share.all}
    return {"text": answer.text, "tokens": answer.tokens} | {name: float(value) for name, value in scores.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
