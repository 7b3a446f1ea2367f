"""Figures as inline SVG: small functions from numbers to :class:`Markup`.

Colours are CSS classes, so that one picture serves light, dark and print. Row figures (forest bar, stacked bar) are drawn
in percent of their width and stretch without distortion; charts have a fixed view box. Values that are missing or not
finite are left out; if none are left, a sentence takes the figure's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from rmscope.report.formatting import decimals_for, fixed, number, real

Range = tuple[float, float]
Points = Sequence[Sequence[Any]]
"""(x, y) or, with an interval, (x, y, low, high)."""
Marks = Sequence[tuple[float, str]]
"""Places on an axis and their labels."""
Series = tuple[str, int, Points]
"""A name, the number of its colour in style.css, and the points of a curve."""
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40
ROW = 22
"""Height of a row figure in pixels."""
LINE = 16
"""Height of a line of names above a plot."""
EMPTY = Markup('<p class="no-figure">nothing to draw</p>')
CURVE_NAMES = {"keep": "features", "unflagged": "without flagged ones", "keep_pca": "PCA", "keep_coordinates": "coordinates"}
"""The curves of keep K: the name of each in the data, and on the page."""


def finite(values: Iterable[Any]) -> list[float]:
    return [v for v in map(real, values) if v is not None]


def extent(values: Iterable[Any], include: Sequence[float] = (), pad: float = 0.0) -> Range:
    """The smallest range over the finite values, never empty; ``pad`` is a share of its width."""
    known = finite([*values, *include])
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if low == high:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    margin = (high - low) * pad
    return low - margin, high + margin


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], about so many."""
    raw = (high - low) / max(1, about)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * 1.0001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks with the fewest decimals that tell them apart."""
    steps = [b - a for a, b in pairwise(values)]
    if not steps:
        return [number(v) for v in values]
    for places in range(decimals_for(min(steps)) + 1):
        if all(abs(round(v, places) - v) < min(steps) * 1e-3 for v in values):
            break
    return ["0" if abs(v) < min(steps) * 1e-3 else fixed(v, places) for v in values]


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area of a chart: the ranges of both axes, and the places of data in the view box."""

    xs: Range
    ys: Range

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Points) -> str:
        return " L".join(f"{self.x(x):g} {self.y(y):g}" for x, y, *_ in points)

    def x_axis(self, marks: Marks, title: str) -> Markup:
        base = HEIGHT - BOTTOM
        parts = [_line("axis", LEFT, WIDTH - RIGHT, base, base)]
        for value, text in marks:
            at = self.x(value)
            parts += [_line("tick", at, at, base, base + 4), _text(at, base + 16, text, "middle")]
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, title, "middle", "axis-title"))
        return Markup("").join(parts)

    def y_axis(self, marks: Marks, title: str) -> Markup:
        parts = []
        for value, text in marks:
            at = self.y(value)
            parts += [_line("grid", LEFT, WIDTH - RIGHT, at, at), _text(LEFT - 6, at + 4, text, "end")]
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = _text(12, middle, title, "middle", "axis-title", f"rotate(-90 12 {middle})")
        return Markup("").join([*parts, turned])


def _line(css: str, x1: float | str, x2: float | str, y1: float, y2: float) -> Markup:
    return Markup(f'<line class="{css}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>')


def _text(x: float, y: float, text: str, anchor: str, css: str = "label", transform: str = "") -> Markup:
    turn = Markup(' transform="{}"').format(transform) if transform else Markup("")
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(css, x, y, anchor, turn, text)


def _chart(name: str, *parts: Markup, height: float = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(WIDTH, height, name) + Markup("").join(parts) + Markup("</svg>")


def _round_marks(span: Range, about: int = 5) -> list[tuple[float, str]]:
    values = ticks(*span, about)
    return list(zip(values, tick_labels(values), strict=True))


def _known(points: Points) -> list[list[float]]:
    """The points of which every number is finite."""
    rows = ([real(v) for v in p] for p in points)
    return [[v for v in row if v is not None] for row in rows if row and None not in row]


def histogram(edges: Sequence[Any], counts: Sequence[Any], title: str, name: str, counted: str = "pairs") -> Markup:
    """Bars between consecutive edges, hollow left of 0, and a line at 0."""
    edges, counts = finite(edges), finite(counts)
    if not counts or len(edges) != len(counts) + 1 or edges[-1] <= edges[0]:
        return EMPTY
    frame = Frame((edges[0], edges[-1]), (0, max(counts) * 1.05 or 1))
    bars = []
    for low, high, n in zip(edges, edges[1:], counts, strict=False):
        x, y = frame.x(low), frame.y(n)
        css = "bar-below" if low + high < 0 else "bar"
        width, height = max(0.5, round(frame.x(high) - x - 1, 1)), round(HEIGHT - BOTTOM - y, 1)
        tip = Markup("<title>{} to {}: {}</title>").format(number(low), number(high), fixed(n, 0))
        bar = Markup(f'<rect class="{css}" x="{x}" y="{y}" width="{width}" height="{height}">')
        bars.append(bar + tip + Markup("</rect>"))
    if edges[0] < 0 < edges[-1]:
        bars.append(_line("zero", frame.x(0), frame.x(0), TOP, HEIGHT - BOTTOM))
    x_axis = frame.x_axis(_round_marks(frame.xs, 6), title)
    return _chart(name, frame.y_axis(_round_marks(frame.ys, 4), counted), *bars, x_axis)


def scatter(points: Points, x_title: str, y_title: str, name: str) -> Markup:
    """Points and the line of equality, both axes on one scale: linear near 0, logarithmic outside (asinh).

    Effects span orders of magnitude; on a linear scale nearly all are on one spot. All dots are one path, 12 bytes per dot.
    """
    known = _known([p[:2] for p in points])
    if not known:
        return EMPTY
    sizes = sorted(abs(v) for p in known for v in p if v)
    reach = max(sizes, default=1.0) * 1.25
    unit = max(sizes[len(sizes) // 4], reach * 1e-6) if sizes else 1.0

    def scale(value: float) -> float:
        return math.asinh(value / unit)

    frame = Frame((scale(-reach), scale(reach)), (scale(-reach), scale(reach)))
    marks = [(scale(v), text) for v, text in _power_marks(unit, reach)]
    corner = (frame.x(frame.xs[0]), frame.y(frame.ys[0]), frame.x(frame.xs[1]), frame.y(frame.ys[1]))
    dots = " ".join(f"M{frame.x(scale(x)):g} {frame.y(scale(y)):g}h0" for x, y in known)
    return _chart(
        name,
        frame.y_axis(marks, y_title),
        Markup('<line class="equal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*corner),
        Markup(f'<path class="{"dots" if len(known) > 60 else "dots few"}" d="{dots}"/>'),
        frame.x_axis(marks, x_title),
    )


def _power_marks(unit: float, reach: float) -> list[tuple[float, str]]:
    """0 and the powers of ten between the unit and the reach, of both signs; at most three of each."""
    powers = list(range(math.ceil(math.log10(unit)), math.floor(math.log10(reach)) + 1))[-3:]
    if not powers:
        return [(v, number(v)) for v in (-unit, 0.0, unit)]
    above = [10.0**p for p in powers]
    labels = [f"{v:g}" if 1e-4 <= v < 1e5 else number(v) for v in above]
    below = [(-v, f"\u2212{text}") for v, text in zip(above, labels, strict=True)]
    return [*reversed(below), (0.0, "0"), *zip(above, labels, strict=True)]


def line(points: Points, x_title: str, y_title: str, name: str) -> Markup:
    """A curve from 0 up, its last point marked with its value."""
    known = _known([p[:2] for p in points])
    if not known:
        return EMPTY
    frame = Frame(extent(x for x, _ in known), extent((y for _, y in known), include=[0.0], pad=0.04))
    frame = Frame(frame.xs, (0.0, frame.ys[1]) if min(y for _, y in known) >= 0 else frame.ys)
    at_x, at_y = frame.x(known[-1][0]), frame.y(known[-1][1])
    return _chart(
        name,
        frame.y_axis(_round_marks(frame.ys, 4), y_title),
        Markup(f'<path class="curve" d="M{frame.path(known)}"/><circle class="curve-end" cx="{at_x}" cy="{at_y}" r="3.5"/>'),
        _text(at_x, at_y - 9, number(known[-1][1]), "end", "value-label"),
        frame.x_axis(_round_marks(frame.xs, 5), x_title),
    )


def curves(series: Sequence[tuple[str, Points]], marks: Sequence[int], x_title: str, y_title: str, name: str) -> Markup:
    """Curves over a count on a logarithmic scale (from 0), named above the plot; y from -.25 to 1, cut off there.

    The interval of the first series is drawn as a band.
    """
    drawn = [(label, _known(points)) for label, points in series]
    if not any(points for _, points in drawn):
        return EMPTY
    last = max(x for _, points in drawn for x, *_ in points)
    frame = Frame((0.0, math.log2(1 + max(last, 1)) * 1.001), _room_above((-0.25, 1.0), len(drawn)))
    parts = []
    for i, (label, points) in enumerate(drawn):
        placed = [(math.log2(1 + x), *(min(1.0, max(-0.25, v)) for v in values)) for x, *values in points]
        if points and i == 0 and all(len(p) == 4 for p in placed):
            parts.append(_band(frame, placed, "band"))
        if points:
            parts.append(_curve(frame, placed, i, label, i))
    x_marks = [(math.log2(1 + k), str(k)) for k in marks if k <= last]
    y_marks = [(v, f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return _chart(name, frame.y_axis(y_marks, y_title), *parts, frame.x_axis(x_marks, x_title))


def band_curves(
    series: Sequence[Series], x_title: str, y_title: str, name: str, marks: Marks | None = None, bound: float | None = None
) -> Markup:
    """Curves on linear axes, named above the plot, each with its 95 % interval as a band if its points have one.

    A line is at 0. ``bound`` shades the effects too small to count; ``marks`` replaces the round marks of the x axis.
    """
    drawn = [(label, colour, _known(points)) for label, colour, points in series]
    drawn = [one for one in drawn if one[2]]
    if not drawn:
        return EMPTY
    points = [p for _, _, curve in drawn for p in curve]
    ys = extent((v for p in points for v in p[1:]), include=[0.0, *([bound, -bound] if bound else [])], pad=0.04)
    frame = Frame(extent(p[0] for p in points), _room_above(ys, len(drawn)))
    parts = []
    if bound:
        top, height = frame.y(bound), round(frame.y(-bound) - frame.y(bound), 1)
        parts.append(Markup(f'<rect class="bound" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{top}" height="{height}"/>'))
    parts += [_band(frame, c, f"band band-{colour}") for _, colour, c in drawn if all(len(p) == 4 for p in c)]
    parts += [_curve(frame, curve, i, label, colour) for i, (label, colour, curve) in enumerate(drawn)]
    parts.append(_line("zero", LEFT, WIDTH - RIGHT, frame.y(0.0), frame.y(0.0)))
    y_marks = [mark for mark in _round_marks(frame.ys, 5) if mark[0] <= ys[1]]
    x_axis = frame.x_axis(_round_marks(frame.xs, 5) if marks is None else marks, x_title)
    return _chart(name, frame.y_axis(y_marks, y_title), *parts, x_axis)


def _room_above(ys: Range, names: int) -> Range:
    """A y axis with room above it for the names of so many curves, two on a line."""
    room = LINE * -(-names // 2)
    return ys[0], ys[1] + (ys[1] - ys[0]) * room / (HEIGHT - TOP - BOTTOM - room)


def _band(frame: Frame, points: Points, css: str) -> Markup:
    """The intervals of a curve as an area."""
    rim = [(x, high) for x, _, _, high in points] + [(x, low) for x, _, low, _ in reversed(points)]
    return Markup('<path class="{}" d="M{}Z"/>').format(css, frame.path(rim))


def _curve(frame: Frame, points: Points, place: int, label: str, colour: int) -> Markup:
    """A curve, and its name above the plot behind a piece of its line."""
    x, y = LEFT + 8 + (place % 2) * (WIDTH - LEFT - RIGHT) / 2, TOP + 6 + LINE * (place // 2)
    drawn = Markup('<path class="curve curve-{}" d="M{}"/>')
    name = _text(x + 28, y + 4, label, "start", f"label curve-name-{colour}")
    return drawn.format(colour, frame.path(points)) + drawn.format(colour, f"{x:g} {y:g}h22") + name


def keep_curves(found: dict[str, Sequence[dict[str, Any]]], name: str) -> Markup:
    """Keep K: delta_r2 against the number of features kept, the others from donors or at their means; and other lists.
    ``found`` has rows {k, donors, mean} by the names of CURVE_NAMES, each figure a {value, low, high}."""

    def points(key: str, which: str = "donors") -> Points:
        return [(p["k"], *(p[which][end] for end in ("value", "low", "high"))) for p in found[key]]

    series = [(label, points(key)) for key, label in CURVE_NAMES.items() if key in found]
    series.insert(1, ("features, rest at the mean", points("keep", "mean")))
    return curves(series, [p["k"] for p in found["keep"]][::2], "features kept", "delta_r2", name)


def count_bars(rows: Sequence[tuple[str, int]], name: str) -> Markup:
    """One bar per row, its count at its end. Rows of 0 stay, so that one sees what was looked for."""
    most = max((n for _, n in rows), default=0)
    if not most:
        return EMPTY
    left, step = 210, 26
    height = step * len(rows) + 6
    parts = []
    for i, (label, n) in enumerate(rows):
        y, width = 4 + step * i, round((WIDTH - left - 40) * n / most, 1)
        parts.append(_text(left - 10, y + 14, label, "end"))
        parts.append(Markup(f'<rect class="bar" x="{left}" y="{y}" width="{width}" height="18"/>'))
        parts.append(_text(left + width + 6, y + 14, str(n), "start", "value-label"))
    return _chart(name, *parts, _line("axis", left, left, 0, height), height=height)


def as_file(svg: Markup) -> str:
    """A chart as an SVG file with a style of its own; in a page the style is that of style.css."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    style = files("rmscope.report").joinpath("templates/figure.css").read_text("utf-8")
    return str(svg).replace("<svg", head, 1).replace(">", f"><style>\n{style}</style>", 1) + "\n"


# Row figures, in percent of their width


def _share(value: float, span: Range) -> float:
    return round(100 * min(1.0, max(0.0, (value - span[0]) / (span[1] - span[0]))), 2)


def _row(name: str, *parts: Markup, css: str = "row-figure", height: int = ROW) -> Markup:
    head = Markup('<svg class="{}" width="100%" height="{}" role="img" aria-label="{}">').format(css, height, name)
    return head + Markup("").join(parts) + Markup("</svg>")


def forest_bar(value: Any, low: Any, high: Any, span: Range, bound: float | None = None, muted: bool = False) -> Markup:
    """A bar from 0 to the value, with its 95 % interval as a whisker, on the x scale of all rows; ``bound`` shades the
    effects too small to claim."""
    value, low, high, bound = real(value), real(low), real(high), real(bound)
    if value is None:
        return Markup("")
    middle = ROW / 2
    zero, at = _share(0.0, span), _share(value, span)
    css = "muted" if muted else "up" if value >= 0 else "down"
    parts = []
    if bound:
        left, right = _share(-abs(bound), span), _share(abs(bound), span)
        parts.append(Markup(f'<rect class="bound" x="{left}%" y="0" width="{right - left:.2f}%" height="{ROW}"/>'))
    parts.append(_line("zero", f"{zero}%", f"{zero}%", 0, ROW))
    box = f'x="{min(zero, at)}%" y="{middle - 4}" width="{abs(at - zero):.2f}%" height="8" rx="1"'
    parts.append(Markup(f'<rect class="effect {css}" {box}/>'))
    between = ""
    if low is not None and high is not None:
        a, b = f"{_share(low, span)}%", f"{_share(high, span)}%"
        parts.append(_line("whisker", a, b, middle, middle))
        parts += [_line("whisker", end, end, middle - 4, middle + 4) for end in (a, b)]
        between = f", 95 % interval {number(low)} to {number(high)}"
    return _row(f"{number(value, plus=True)} reward{between}", *parts)


def forest_axis(span: Range, about: int = 4) -> Markup:
    """The labelled scale above a column of forest bars."""
    parts = []
    for value, text in _round_marks(span, about):
        at = _share(value, span)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        parts.append(Markup('<text class="label" x="{}%" y="12" text-anchor="{}">{}</text>').format(at, anchor, text))
        parts.append(_line("tick", f"{at}%", f"{at}%", 17, ROW))
    return _row("scale, reward", *parts)


def stacked_bar(parts: Sequence[tuple[str, Any]], labels: Mapping[str, str] | None = None) -> Markup:
    """Shares of 1, one after another: positive ones to the right of 0, negative ones to its left.

    A part's name sets its colour; ``labels`` replaces the names that are read.
    """
    labels = labels or {}
    known = [(name, v) for name, v in ((name, real(v)) for name, v in parts) if v is not None]
    if not known:
        return EMPTY
    right, left = sum(v for _, v in known if v > 0), sum(v for _, v in known if v < 0)
    span = (min(0.0, left), max(1.0, right))
    height, drawn, ahead, behind = 34, [], 0.0, 0.0
    for name, v in known:
        start = ahead if v >= 0 else behind + v
        ahead, behind = (ahead + v, behind) if v >= 0 else (ahead, behind + v)
        x, width = _share(start, span), _share(start + abs(v), span) - _share(start, span)
        tip = Markup("<title>{}: {} %</title>").format(labels.get(name, name), number(100 * v))
        shape = Markup('<rect class="part part-{}" x="{}%" y="4" width="{}%" height="26">')
        drawn.append(shape.format(name, x, f"{width:.2f}") + tip + Markup("</rect>"))
    zero = f"{_share(0.0, span)}%"
    drawn.append(_line("zero", zero, zero, 0, height))
    name = ", ".join(f"{labels.get(n, n)} {number(100 * v)} %" for n, v in known)
    return _row(name, *drawn, css="row-figure stacked", height=height)
