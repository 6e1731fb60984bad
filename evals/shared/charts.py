"""Small charts as SVG text, for pages and files: named points, and lines over a few values of x."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 300, 46, 550, 12, 258
# Mid tones, legible on the light and on the dark page.
_COLOURS = ("#1f6f8b", "#c2703d", "#6a8f3c", "#7a5aa6", "#b04a6f", "#808080")


@dataclass(frozen=True)
class Point:
    """A named point of a scatter chart."""

    name: str
    x: float
    y: float


def scatter_chart(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Draw named points over a logarithmic x axis, as the papers plot quality over speed.

    Args:
        points: with x > 0 and y >= 0.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.

    Returns:
        A complete SVG document.
    """
    logs = [float(np.log10(point.x)) for point in points]
    # The axis begins and ends at half powers of ten: 1, 3.16, 10, ...
    low, high = np.floor(min(logs) * 2) / 2, np.ceil(max(logs) * 2) / 2
    high = high if high > low else low + 0.5
    ticks = nice_ticks(max(max(point.y for point in points), 1e-9), at_most=5)
    parts = _frame(x_title, y_title, [(value, _y(value, ticks[-1])) for value in ticks])
    for power in np.arange(low, high + 0.01, 0.5):
        x = _LEFT + (_RIGHT - _LEFT) * (power - low) / (high - low)
        parts.append(_text(x, _BOTTOM + 16, f"{10.0**power:,.3g}", "middle"))
    for number, (point, log) in enumerate(zip(points, logs, strict=True)):
        x, y = _LEFT + (_RIGHT - _LEFT) * (log - low) / (high - low), _y(point.y, ticks[-1])
        right = x < (_LEFT + _RIGHT) / 2  # a name stands on the side with more room
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        parts.append(_text(x + (8 if right else -8), y + 4, point.name, "start" if right else "end"))
    return _svg(parts)


def line_chart(lines: Mapping[str, Sequence[float]], x_labels: Sequence[str], *, x_title: str, y_title: str) -> str:
    """Draw one line per name over labels at equal distances.

    Args:
        lines: name -> values, one per label: at or above 0, or NaN, which leaves a gap.
        x_labels: below the axis.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.

    Returns:
        A complete SVG document.
    """
    largest = max((value for line in lines.values() for value in line if np.isfinite(value)), default=1.0)
    ticks = nice_ticks(max(largest, 1e-9), at_most=5)
    step = (_RIGHT - _LEFT - 40) / max(1, len(x_labels) - 1)
    xs = [_LEFT + 20 + step * number for number in range(len(x_labels))]
    parts = _frame(x_title, y_title, [(value, _y(value, ticks[-1])) for value in ticks])
    parts += [_text(x, _BOTTOM + 16, label, "middle") for x, label in zip(xs, x_labels, strict=True)]
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        # Values below 0, such as a negative cosine, are drawn on the axis.
        points = [(x, _y(max(0.0, value), ticks[-1])) for x, value in zip(xs, line, strict=True) if np.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<rect x="{_LEFT + 8}" y="{_BOTTOM - 16 - 15 * number}" width="9" height="9" fill="{colour}"/>')
        parts.append(_text(_LEFT + 22, _BOTTOM - 8 - 15 * number, name, "start"))
    return _svg(parts)


def _frame(x_title: str, y_title: str, ticks: Sequence[tuple[float, float]]) -> list[str]:
    parts = [
        f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-opacity=".3"/>'
        for _, y in ticks
    ]
    parts += [_text(_LEFT - 6, y + 4, f"{value:g}", "end") for value, y in ticks]
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 34, x_title, "middle"))
    parts.append(_text(_LEFT + 4, _TOP + 10, y_title, "start"))
    return parts


def _y(value: float, highest: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP - 16) * value / highest


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="#777">{escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def nice_ticks(largest: float, *, at_most: int, whole: bool = False) -> Sequence[float]:
    """Return round numbers from 0 to `largest` or just beyond: steps of 1, 2 or 5 times a power of ten.

    Args:
        largest: value to cover, above 0.
        at_most: number of steps.
        whole: only whole numbers.
    """
    rough = largest / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    # The tolerance keeps an exact fit, such as 0.3 / 3, from the next larger step.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    # Steps of training have no halves.
    if whole:
        step = max(1.0, step)
    return [round(number * step, 12) for number in range(math.ceil(largest / step - 1e-9) + 1)]
