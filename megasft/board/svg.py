"""Pictures without a browser: plots as SVG, loads of experts as PNG."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from megasft.board.plots import Plot

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
COLORS = 10  # --c0 to --c9 of colors.css
EVEN, LOW, HIGH = (236, 237, 240), (59, 111, 212), (210, 105, 30)


@dataclass(frozen=True)
class Line:
    """One curve: its places and values, and which colour and label it has."""

    x: Sequence[float]
    y: Sequence[float]
    color: int
    label: str = ""
    dashed: bool = False


def figure(plot: Plot, lines: list[Line], x_range: tuple[float, float]) -> str:
    """A plot with its title and legend as HTML."""
    named = [line for line in lines if line.label]
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 18 8">{_key(plot, line)}</svg>{escape(line.label)}</span>'
        for line in named
    )
    legend = f'<span class="keys">{keys}</span>' if len(named) > 1 else ""
    return (
        f'<figure class="plot"><figcaption><span class="title">{escape(plot.title)}</span> '
        f'<span class="unit">{escape(plot.unit)}</span>{legend}</figcaption>{picture(plot, lines, x_range)}</figure>'
    )


def picture(plot: Plot, lines: list[Line], x_range: tuple[float, float]) -> str:
    """The plot alone."""
    if plot.form == "stack":
        lines = _stacked(lines)
    shown = [
        (line, [(x, y * plot.scale) for x, y in zip(line.x, line.y, strict=True) if not plot.logarithmic or y > 0])
        for line in lines
    ]
    values = [y for _, points in shown for _, y in points]
    low, high = _range(plot, values)
    ticks = _decades(low, high) if plot.logarithmic else steps(low, high, 5)
    first, last = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / low) / math.log(high / low) if plot.logarithmic else (y - low) / (high - low)
        across = (x - first) / (last - first)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    places = steps(first, last, 5)
    for tick in places:
        x, _ = place(tick, low)
        if tick == places[-1]:
            x, text, anchor = min(x + 14, WIDTH - 2), f"{number(tick)} steps", "end"
        else:
            text, anchor = number(tick), "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    bottom: list[tuple[float, float]] | None = None
    for line, points in shown:
        if not points:
            continue
        path = [place(x, y) for x, y in points]
        color = f"c{line.color % COLORS}"
        if plot.form == "stack":
            below = bottom or [(path[0][0], place(first, low)[1]), (path[-1][0], place(first, low)[1])]
            parts.append(f'<path class="area {color}" d="{_path(path + below[::-1])}Z"/>')
            bottom = path
        elif len(path) == 1:
            parts.append(f'<circle class="point {color}" cx="{path[0][0]:.1f}" cy="{path[0][1]:.1f}" r="3"/>')
        else:
            parts.append(f'<path class="line {color}{" dashed" if line.dashed else ""}" d="{_path(path)}"/>')
    label = escape(f"{plot.title}, {number(first)} to {number(last)} steps", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def load_picture(tokens: NDArray[np.float32]) -> str:
    """The load of each expert over its layer's mean, a pixel each, as a PNG in a data URI: tokens [layer, expert]."""
    mean = tokens.mean(axis=1, keepdims=True)
    load = np.clip(tokens / np.where(mean > 0, mean, 1), 0, 2)[..., None]
    even, low, high = (np.array(color, np.float32) for color in (EVEN, LOW, HIGH))
    colors = np.where(load < 1, low + (even - low) * load, even + (high - even) * (load - 1))
    pixels = colors.round().astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", tokens.shape[1], tokens.shape[0], 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def number(value: float) -> str:
    """Short: 3 significant digits, k, M, G, T from 10,000 on, powers of ten below 0.001."""
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    for unit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(unit, 1e4):
            return f"{value / unit:.3g}{sign}"
    return f"{value:.4g}"


def steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    factors = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _range(plot: Plot, values: list[float]) -> tuple[float, float]:
    if not values:
        return (0.1, 1.0) if plot.logarithmic else (0.0, 1.0)
    low, high = min(values), max(values)
    if plot.logarithmic:
        more = max((high / low) ** 0.06, 1.05)
        return low / more, high * more
    if plot.from_zero and low >= 0:
        return 0.0, 1.08 * high or 1.0
    more = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return low - more, high + more


def _stacked(lines: list[Line]) -> list[Line]:
    """Each line on top of those before it, over the places of all."""
    places = sorted({x for line in lines for x in line.x})
    below, found = dict.fromkeys(places, 0.0), []
    for line in lines:
        own = dict(zip(line.x, line.y, strict=True))
        below = {x: sum_ + own.get(x, 0.0) for x, sum_ in below.items()}
        found.append(Line(places, list(below.values()), line.color, line.label))
    return found


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _key(plot: Plot, line: Line) -> str:
    color = f"c{line.color % COLORS}"
    if plot.form == "stack":
        return f'<rect class="area {color}" x="4" width="9" height="8"/>'
    return f'<path class="line {color}{" dashed" if line.dashed else ""}" d="M0 4H18"/>'
