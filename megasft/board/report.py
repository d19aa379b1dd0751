"""report.html: one self-contained file that says all of a run, without scripts and without anything from elsewhere."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megasft.board import plots
from megasft.board.curves import bin_width, curves, extent
from megasft.board.describe import flat_settings, total_steps
from megasft.board.run_folder import Run, is_run
from megasft.board.svg import Line, figure, load_picture, number
from megasft.messages import UserError, say

FILE = "report.html"
STATIC = Path(__file__).parent / "static"
POINTS = 400  # of a curve
EVENTS = 200  # that are listed, checkpoints left out
ALL = (-1e300, 1e300)
GIB = 2**30


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory to `out`, by default into it. Raises UserError."""
    if not is_run(folder):
        raise UserError(f"{folder}: is not a run directory (metrics.jsonl); name one, such as runs/demo")
    run = Run(folder.resolve(), folder.resolve().name)
    while run.advance():
        pass
    path = out or folder / FILE
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(html(run), encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None
    return path


def write_at_end(folder: str) -> None:
    """The report of a run that is done; what goes wrong is said and changes nothing else."""
    try:
        write_report(Path(folder))
    except UserError as error:
        say(str(error))


def html(run: Run) -> str:
    """The file's text."""
    sections = [
        _facts(run),
        _section("Use the adapter", _usage(run)),
        *_plots(run),
        _section("Load of the experts", _experts(run)),
        _section("Answers to validation prompts", _answers(run)),
        _section("Data, topology and environment", _table(_about(run))),
        _section("Events", _events(run)),
        _section("Settings", _table(flat_settings(run.config()))),
    ]
    written = datetime.now().astimezone().isoformat(" ", "seconds")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"content-security-policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(run.name)} · megasft</title><style>{_style()}</style></head><body>"
        f"<header><h1>{escape(run.name)}</h1><p>{_state(run)}; report of {written}</p></header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


# --- sections --------------------------------------------------------------------------------------------------------


def _state(run: Run) -> str:
    content, planned = run.content, total_steps(run)
    finished = (run.folder / "adapter" / "adapter_config.json").is_file()
    steps = f"{content.step:,} steps" if finished or not planned else f"{content.step:,} of {planned:,} steps"
    return f"{'finished' if finished else 'not finished'}, {steps}"


def _facts(run: Run) -> str:
    """The numbers to look at first."""
    content, last = run.content, run.content.last
    found: list[tuple[str, str, str]] = []  # name, value, remark
    if "train.loss" in last:
        found.append(("training loss", number(last["train.loss"]), "last line"))
    if content.lowest:
        found.append(("best validation loss", number(content.lowest[0]), f"at step {content.lowest[1]:,}"))
    if "validation.loss" in last:
        found.append(("last validation loss", number(last["validation.loss"]), ""))
    if "validation.token_accuracy" in last:
        found.append(("validation accuracy", f"{100 * last['validation.token_accuracy']:.1f}%", "of tokens"))
    if content.tokens:
        found.append(("tokens", number(content.tokens), "without padding"))
    found.append(("time", _duration(content.ended - content.started), "first to last line"))
    for key, name, scale, unit in (
        ("train.tokens_per_second", "tokens/s", 1.0, ""),
        ("train.mfu", "MFU", 100.0, "%"),
        ("train.model_flops_per_second", "model TFLOP/s per device", 1e-12, ""),
    ):
        series = content.series(key, "step")
        if series is not None and len(series.mean):
            found.append((name, f"{number(float(f'{scale * np.median(series.mean):.3g}'))}{unit}", "median"))
    for key, name in (
        ("train.memory_peak", "peak memory"),
        ("train.memory_reserved", "reserved memory"),
        ("train.rss", "host memory"),
    ):
        series = content.series(key, "step")
        if series is not None and len(series.high):
            found.append((name, f"{float(series.high.max()) / GIB:.2f} GiB", "of a rank"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in found
    )
    return f'<dl class="facts">{items}</dl>'


def _usage(run: Run) -> str:
    """The lines that load the adapter in peft and serve it in vLLM; "" where there is none."""
    from megasft.generation.request import Request

    adapter = run.folder / "adapter"
    job = run.config().get("job")
    model = job.get("model") if isinstance(job, dict) else None
    if not (adapter / "adapter_config.json").is_file() or not isinstance(model, str):
        return ""
    shown = os.path.relpath(adapter)
    shown = str(adapter) if shown.startswith("..") else shown
    peft = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({model!r}, dtype="auto", device_map="auto")\n'
        f"model = PeftModel.from_pretrained(base, {shown!r})\n"
    )
    blocks = [("peft", peft)]
    with contextlib.suppress(UserError):  # the adapter cannot be read
        blocks.append(("vLLM", Request(model, shown).vllm_command()))
    blocks.append(("megasft", shlex.join(["megasft", "generate", os.path.dirname(shown)])))
    best = run.folder / "best" / "adapter_config.json"
    note = "<p>The adapter of the best validation is in <code>best/</code>.</p>" if best.is_file() else ""
    return note + "".join(f"<h3>{name}</h3><pre>{escape(text)}</pre>" for name, text in blocks)


def _plots(run: Run) -> Iterable[str]:
    content = run.content
    low, high, most = extent([content], "step")
    width = bin_width(low, high, POINTS) if most > POINTS else 0.0
    known = set(content.keys)
    for group, members in groupby(plots.PLOTS, lambda plot: plot.group):
        figures = []
        for plot in members:
            labels = plots.resolve(plot, known)
            found = curves(content, list(labels), "step", ALL, width)
            one_run = plot.form == "runs"
            lines = [
                Line(found[key]["x"], found[key]["mean"], 0 if one_run else i, label, one_run and i > 0)
                for i, (key, label) in enumerate(labels.items())
                if key in found
            ]
            if lines:
                figures.append(figure(plot, lines, (low, high)))
        if figures:
            yield _section(group, f'<div class="grid">{"".join(figures)}</div>')


def _experts(run: Run) -> str:
    frames = run.content.frames
    if not frames:
        return ""
    parts = []
    for step, tokens in frames[:1] + frames[-1:] if len(frames) > 1 else frames:
        layers, experts = tokens.shape
        idle = int((tokens == 0).sum())
        text = f"step {step:,}: {layers} layers (down) x {experts} experts (across), {idle} without a token"
        parts.append(
            f'<figure class="plot"><figcaption>{text}</figcaption><img class="load" alt="{text}" '
            f'height="{min(420, max(60, 8 * layers))}" src="{load_picture(tokens)}"></figure>'
        )
    scale = '<p class="scale">no token <i></i> twice the mean of the layer, or more</p>'
    return f'<div class="grid wide">{"".join(parts)}</div>{scale}'


def _answers(run: Run) -> str:
    parts = []
    for answer in run.answers():
        texts = "".join(
            f"<div><h3>{name}</h3><p>{escape(answer[key]) or '(empty)'}</p></div>"
            for key, name in (
                ("before", "before: the base model"),
                ("after", "after training"),
                ("reference", "reference"),
            )
            if key in answer
        )
        prompt = escape(answer.get("prompt", ""))
        parts.append(f'<article><h3>prompt</h3><p>{prompt}</p><div class="texts">{texts}</div></article>')
    return "".join(parts)


def _about(run: Run) -> list[tuple[str, str]]:
    """Data, topology, environment; numbers with separators."""
    return [(key, f"{int(value):,}" if value.isdigit() else value) for key, value in flat_settings(run.about())]


def _events(run: Run) -> str:
    content = run.content
    rows = [
        (f"{event['step']:,}", event["event"].replace("_", " "), event["reason"])
        for event in list(content.events)[-EVENTS:]
    ]
    checkpoints = f"<p>{len(content.checkpoints):,} checkpoints</p>" if content.checkpoints else ""
    return checkpoints + _table(rows)


# --- parts -----------------------------------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _table(rows: Iterable[Iterable[Any]]) -> str:
    text = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{text}</table></div>' if text else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _style() -> str:
    """report.css, with the colours of the page; those of the dark theme where the reader's system is dark."""
    light, dark = re.findall(r"\{(.*?)\}", (STATIC / "colors.css").read_text(encoding="utf-8"), re.DOTALL)
    colors = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    lines = "".join(f".line.c{i}{{stroke:var(--c{i})}}.area.c{i},.point.c{i}{{fill:var(--c{i})}}" for i in range(10))
    return colors + lines + (STATIC / "report.css").read_text(encoding="utf-8")
