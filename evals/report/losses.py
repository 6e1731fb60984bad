"""Training losses as small line charts: values from a run's `metrics.jsonl`, coordinates for inline SVG."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from evals.errors import EvalError
from evals.shared.charts import nice_ticks
from trainer.monitoring.metrics import METRICS_FILE

WIDTH, HEIGHT = 320, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 308, 10, 154
"""Edges of the plotting area in chart units; the numbers of the axes are outside."""


@dataclass(frozen=True)
class Metrics:
    """A run's log.

    Attributes:
        steps: of the lines.
        losses: teacher -> part ("summary", "spatial") -> one value per line, or None.
        images_per_s: median over the lines.
        data_wait: mean share of time spent waiting for data.
    """

    steps: tuple[int, ...]
    losses: dict[str, dict[str, tuple[float | None, ...]]]
    images_per_s: float
    data_wait: float


@dataclass(frozen=True)
class Tick:
    """A number on an axis and its coordinate in chart units."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        part: "summary" or "spatial".
        points: of an SVG polyline.
        end_x, end_y: of the last point, chart units.
        last: its value.
    """

    part: str
    points: str
    end_x: float
    end_y: float
    last: float


@dataclass(frozen=True)
class Chart:
    """One teacher's losses over training steps."""

    teacher: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: float = _LEFT
    right: float = _RIGHT
    bottom: float = _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def read_metrics(run: Path) -> Metrics | None:
    """Read the log of a run; return None if there is none, as for an exported student. An incomplete last line is ignored.

    Raises:
        EvalError: if the file cannot be read, or is not a log of radio-train.
    """
    path = run / METRICS_FILE
    # An export has no log, and a page without charts is still of use.
    if not path.exists():
        return None
    try:
        texts = path.read_bytes().splitlines(keepends=True)
    except OSError as exc:
        raise EvalError(f"{path} cannot be read: {exc}") from exc
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(cast(dict[str, Any], json.loads(text)))
        except (ValueError, RecursionError) as exc:
            # Only the last line can be cut short, and only if it has no line end.
            if number == len(texts) and not text.endswith(b"\n"):  # a run that was killed while it wrote
                break
            raise EvalError(f"{path}, line {number} is not JSON: {exc}") from exc
    if not lines:
        return None
    try:
        # All lines of a run have the same teachers.
        teachers = list(lines[-1]["teachers"])
        losses = {
            teacher: {part: tuple(line["teachers"][teacher][part] for line in lines) for part in ("summary", "spatial")}
            for teacher in teachers
        }
        speeds = sorted(float(line["images_per_s"]) for line in lines)
        waits = [float(line["data_wait"]) for line in lines]
        steps = tuple(int(line["step"]) for line in lines)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise EvalError(f"{path} lacks {exc} in some line: it is not a log of radio-train") from exc
    return Metrics(steps, losses, speeds[len(speeds) // 2], sum(waits) / len(waits))


def loss_charts(metrics: Metrics) -> tuple[Chart, ...]:
    """Return one chart per teacher, all on one scale from zero, so that their heights can be compared."""
    # One scale for all charts needs the largest loss of all teachers.
    values = [v for parts in metrics.losses.values() for part in parts.values() for v in part if _drawable(v)]
    y_values = nice_ticks(max(values, default=0.0) or 1.0, at_most=4)
    x_span, y_span = max(*metrics.steps, 1), y_values[-1]
    x_values = nice_ticks(x_span, at_most=5, whole=True)

    # SVG's y axis points down.
    def x(step: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * step / x_span, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / y_span, 1)

    charts: list[Chart] = []
    for teacher, parts in metrics.losses.items():
        curves: list[Curve] = []
        for part, series in parts.items():
            drawable_points = [
                (step, value) for step, value in zip(metrics.steps, series, strict=True) if _drawable(value)
            ]
            if drawable_points:
                points = " ".join(f"{x(step)},{y(value)}" for step, value in drawable_points)
                step, value = drawable_points[-1]
                curves.append(Curve(part, points, x(step), y(value), value))
        charts.append(
            Chart(
                teacher=teacher,
                curves=tuple(curves),
                # nice_ticks may end beyond the last step; such a tick would lie outside the chart.
                x_ticks=tuple(Tick(x(v), f"{v:,.0f}") for v in x_values if v <= x_span),
                y_ticks=tuple(Tick(y(v), f"{v:g}") for v in y_values),
            )
        )
    return tuple(charts)


def _drawable(value: float | None) -> TypeGuard[float]:
    # A step without this teacher has no value, and a diverged one has NaN.
    return value is not None and math.isfinite(value)
