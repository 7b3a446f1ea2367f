"""Charts of curves with their intervals on linear axes, and counts as rows; the conventions are those of ``figures.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from rmscope.report.figures import (
    LEFT,
    RIGHT,
    WIDTH,
    Frame,
    _chart,
    _known,
    _round_marks,
    _text,
    above,
    empty,
    entry,
    extent,
)

Series = tuple[str, int, Sequence[Sequence[Any]]]
"""A name, the number of its colour in style.css, points (x, y) or (x, y, low, high)."""


def banded(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    name: str,
    marks: Sequence[tuple[float, str]] | None = None,
    bound: float | None = None,
) -> Markup:
    """Curves, each with its 95 % interval as a band where its points carry one, named above the plot; a line at 0.

    ``bound`` shades the effects too small to count; ``marks`` are the x axis' own.
    """
    drawn = [(label, colour, _known(points)) for label, colour, points in series]
    drawn = [one for one in drawn if one[2]]
    if not drawn:
        return empty()
    points = [p for _, _, curve in drawn for p in curve]
    ys = extent((v for p in points for v in p[1:]), include=[0.0, *([bound, -bound] if bound else [])], pad=0.04)
    frame = Frame(extent(p[0] for p in points), above(ys, len(drawn)))
    parts = [_shade(frame, bound)] if bound else []
    for _, colour, curve in drawn:
        if all(len(p) == 4 for p in curve):
            rim = [(x, high) for x, _, _, high in curve] + [(x, low) for x, _, low, _ in reversed(curve)]
            parts.append(Markup('<path class="band band-{}" d="M{}Z"/>').format(colour, _path(frame, rim)))
    for i, (label, colour, curve) in enumerate(drawn):
        parts.append(Markup('<path class="curve curve-{}" d="M{}"/>').format(colour, _path(frame, [p[:2] for p in curve])))
        parts.append(entry(i, label, colour))
    parts.append(_zero(frame))
    x_marks = list(marks) if marks is not None else _round_marks(frame.xs, 5)
    y_marks = [mark for mark in _round_marks(frame.ys, 5) if mark[0] <= ys[1]]
    return _chart(name, frame.y_axis(y_marks, y_title), *parts, frame.x_axis(x_marks, x_title))


def _path(frame: Frame, points: Sequence[Sequence[float]]) -> str:
    return " L".join(f"{frame.x(x):g} {frame.y(y):g}" for x, y in points)


def _shade(frame: Frame, bound: float) -> Markup:
    top, bottom = frame.y(bound), frame.y(-bound)
    box = f'x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{top}" height="{round(bottom - top, 1)}"'
    return Markup(f'<rect class="bound" {box}/>')


def _zero(frame: Frame) -> Markup:
    at = frame.y(0.0)
    return Markup(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')


def counts(rows: Sequence[tuple[str, int]], name: str) -> Markup:
    """A bar a row, its count at its end; rows of 0 stay, so that what was looked for is seen."""
    most = max((n for _, n in rows), default=0)
    if not most:
        return empty()
    left, step = 210, 26
    height = step * len(rows) + 6
    parts = []
    for i, (label, n) in enumerate(rows):
        y, width = 4 + step * i, round((WIDTH - left - 40) * n / most, 1)
        parts.append(_text(left - 10, y + 14, label, "end"))
        parts.append(Markup(f'<rect class="bar" x="{left}" y="{y}" width="{width}" height="18"/>'))
        parts.append(_text(left + width + 6, y + 14, str(n), "start", "value-label"))
    parts.append(Markup(f'<line class="axis" x1="{left}" x2="{left}" y1="0" y2="{height}"/>'))
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(WIDTH, height, name) + Markup("").join(parts) + Markup("</svg>")
