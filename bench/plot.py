"""A line plot as SVG text: logarithmic x, linear y from zero. No library: three lines and their names are all that is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 50, 90
COLOURS = ("#0b6e99", "#c2571a", "#5b7f2b", "#7a3b8f")


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]


def render_plot(title: str, x_name: str, y_name: str, series: Sequence[Series], *, note: str = "") -> str:
    """Every point is drawn and its value written beside it."""
    xs = sorted({x for s in series for x, _ in s.points})
    top = _round_up(max(y for s in series for _, y in s.points))
    low, high = math.log10(xs[0]), math.log10(xs[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 24, title, size=15),
        _text(LEFT, 40, y_name),
        _text(WIDTH - RIGHT, HEIGHT - BOTTOM + 34, x_name, anchor="end"),
        _text(LEFT, HEIGHT - 12, note, size=10),
    ]
    for part in range(5):
        _, y = place(xs[0], top * part / 4)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(_text(LEFT - 8, y + 4, f"{top * part / 4:g}", anchor="end"))
    for x in xs:
        out.append(_text(place(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}", anchor="middle"))
    for number, (one, colour) in enumerate(zip(series, COLOURS, strict=False)):
        places = [place(x, y) for x, y in one.points]
        out.append(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(places, one.points, strict=True):
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            out.append(_text(x, y - 7, f"{value:.0f}" if value >= 10 else f"{value:.1f}", anchor="middle", colour=colour))
        out.append(_text(LEFT + number * 210, HEIGHT - 32, f"— {one.name}", colour=colour))
    return "\n".join([*out, "</svg>", ""])


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten: its quarters are short numbers."""
    step = 10 ** math.floor(math.log10(value))
    return next(step * n for n in (1, 2, 4, 8, 10) if step * n >= value)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
