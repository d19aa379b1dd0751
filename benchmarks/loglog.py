"""Curves on logarithmic axes as an SVG that stands alone: a power law is a straight line, its exponent the slope."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megasft.board.svg import number

COLORS = ("#2563eb", "#c2570c", "#0a8a5f", "#9333ea", "#d12c7d", "#0b86a3", "#8a6340", "#5f6b7c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, COLUMNS = 270, 200, 40, 22, 20, 3
KEYS = 4  # of the legend, in a row


@dataclass(frozen=True)
class Panel:
    """One plot: at each of `x` the values of `lines`, by name, each shown as a multiple of its first."""

    title: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y = c x^p, by least squares of the logarithms. NaN where a value is 0."""
    if min(y) <= 0:
        return math.nan
    xs, ys = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True)) / sum((a - mean_x) ** 2 for a in xs)


def picture(panels: list[Panel]) -> str:
    """All panels, three beside each other, and one legend."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    assert len(names) <= len(COLORS)
    colors = dict(zip(names, COLORS, strict=False))
    rows = -(-len(panels) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows + 16 * -(-len(names) // KEYS) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for i, panel in enumerate(panels):
        place = f"translate({i % COLUMNS * WIDTH} {i // COLUMNS * HEIGHT})"
        out.append(f'<g transform="{place}">{"".join(_panel(panel, colors))}</g>')
    for i, name in enumerate(names):
        x, y = LEFT + i % KEYS * (width - LEFT) / KEYS, HEIGHT * rows + 16 * (i // KEYS) + 8
        out.append(f'<path d="M{x:.0f} {y}h18" stroke="{colors[name]}" stroke-width="2"/>')
        out.append(f'<text x="{x + 22:.0f}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(panel: Panel, colors: dict[str, str]) -> list[str]:
    shown = {name: [value / y[0] for value in y] for name, y in panel.lines.items() if min(y) > 0}
    values = [value for y in shown.values() for value in y]
    low, high = min([0.5, *values]), max([2.0, *values])
    x_low, x_high = math.log(panel.x[0]), math.log(panel.x[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log(x) - x_low) / (x_high - x_low), math.log(y / low) / math.log(high / low)
        return LEFT + across * (WIDTH - LEFT - 16), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM - 8)

    out = [f'<text x="{LEFT}" y="14" font-weight="bold">{escape(panel.title)}</text>']
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 30 else (1,)
    for tick in (factor * 10.0**power for power in powers for factor in factors):
        if not low <= tick <= high:
            continue
        height = place(panel.x[0], tick)[1]
        out.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - 16}" stroke="#d9dee4"/>')
        out.append(f'<text x="{LEFT - 4}" y="{height + 4:.1f}" text-anchor="end">{number(tick)}x</text>')
    skip = -(-len(panel.x) // 6)
    for tick in panel.x[::skip]:
        out.append(f'<text x="{place(tick, low)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:g}</text>')
    for name, y in shown.items():
        places = [place(*point) for point in zip(panel.x, y, strict=True)]
        points = "L".join(f"{across:.1f} {up:.1f}" for across, up in places)
        out.append(f'<path d="M{points}" fill="none" stroke="{colors[name]}" stroke-width="2"/>')
    return out
