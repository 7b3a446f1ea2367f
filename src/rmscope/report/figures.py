"""Figures as inline SVG: small functions from numbers to :class:`Markup`.

Colours are CSS classes, so that one picture serves light, dark and print. Figures of a row (forest bar,
stacked bar) are drawn in percent of their width and stretch without distortion; charts have a fixed view
box. Values that are missing or not finite are left out, and a figure without values says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from rmscope.report.formatting import decimals_for, fixed, number, real

Range = tuple[float, float]
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40
ROW = 22
"""Height of a row figure in pixels."""


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


def empty(note: str = "nothing to draw") -> Markup:
    return Markup('<p class="no-figure">{}</p>').format(note)


# ── charts with axes


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area: data coordinates to those of the view box."""

    xs: Range
    ys: Range

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def x_axis(self, marks: Sequence[tuple[float, str]], title: str) -> Markup:
        base = HEIGHT - BOTTOM
        parts = [Markup(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')]
        for value, text in marks:
            at = self.x(value)
            parts.append(Markup(f'<line class="tick" x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}"/>'))
            parts.append(_text(at, base + 16, text, "middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, title, "middle", "axis-title"))
        return Markup("").join(parts)

    def y_axis(self, marks: Sequence[tuple[float, str]], title: str) -> Markup:
        parts = []
        for value, text in marks:
            at = self.y(value)
            parts.append(Markup(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'))
            parts.append(_text(LEFT - 6, at + 4, text, "end"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = _text(12, middle, title, "middle", "axis-title", f"rotate(-90 12 {middle})")
        return Markup("").join([*parts, turned])


def _text(x: float, y: float, text: str, anchor: str, css: str = "label", transform: str = "") -> Markup:
    turn = Markup(' transform="{}"').format(transform) if transform else Markup("")
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(css, x, y, anchor, turn, text)


def _chart(name: str, *parts: Markup) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(WIDTH, HEIGHT, name) + Markup("").join(parts) + Markup("</svg>")


def _round_marks(span: Range, about: int = 5) -> list[tuple[float, str]]:
    values = ticks(*span, about)
    return list(zip(values, tick_labels(values), strict=True))


def histogram(edges: Sequence[Any], counts: Sequence[Any], title: str, name: str, counted: str = "pairs") -> Markup:
    """Bars between consecutive edges; those left of 0 are drawn hollow, a line stands at 0."""
    edges, counts = finite(edges), finite(counts)
    if not counts or len(edges) != len(counts) + 1 or edges[-1] <= edges[0]:
        return empty()
    frame = Frame((edges[0], edges[-1]), (0, max(counts) * 1.05 or 1))
    bars = []
    for low, high, n in zip(edges, edges[1:], counts, strict=False):
        x, y = frame.x(low), frame.y(n)
        css = "bar-below" if low + high < 0 else "bar"
        width, height = max(0.5, round(frame.x(high) - x - 1, 1)), round(HEIGHT - BOTTOM - y, 1)
        tip = Markup("<title>{} to {}: {}</title>").format(number(low), number(high), fixed(n, 0))
        bars.append(
            Markup(f'<rect class="{css}" x="{x}" y="{y}" width="{width}" height="{height}">') + tip + Markup("</rect>")
        )
    zero = Markup("")
    if edges[0] < 0 < edges[-1]:
        at = frame.x(0)
        zero = Markup(f'<line class="zero" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _chart(
        name,
        frame.y_axis(_round_marks(frame.ys, 4), counted),
        *bars,
        zero,
        frame.x_axis(_round_marks(frame.xs, 6), title),
    )


def scatter(points: Sequence[Sequence[Any]], x_title: str, y_title: str, name: str) -> Markup:
    """Points and the line of equality, on one scale for both: linear near 0, logarithmic outside (asinh).

    Effects span orders of magnitude; on a linear scale nearly all lie on one spot. All dots are one path,
    12 bytes a dot.
    """
    known = [(x, y) for x, y in ((real(p[0]), real(p[1])) for p in points) if x is not None and y is not None]
    if not known:
        return empty()
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
    """0 and the powers of ten between the unit and the reach, both signs; at most three a side."""
    powers = list(range(math.ceil(math.log10(unit)), math.floor(math.log10(reach)) + 1))[-3:]
    if not powers:
        return [(v, number(v)) for v in (-unit, 0.0, unit)]
    above = [10.0**p for p in powers]
    labels = [f"{v:g}" if 1e-4 <= v < 1e5 else number(v) for v in above]
    below = [(-v, f"\u2212{text}") for v, text in zip(above, labels, strict=True)]
    return [*reversed(below), (0.0, "0"), *zip(above, labels, strict=True)]


def line(points: Sequence[Sequence[Any]], x_title: str, y_title: str, name: str) -> Markup:
    """A curve from 0 up, its last point marked with its value."""
    known = [(x, y) for x, y in ((real(p[0]), real(p[1])) for p in points) if x is not None and y is not None]
    if not known:
        return empty()
    frame = Frame(extent((x for x, _ in known)), extent((y for _, y in known), include=[0.0], pad=0.04))
    frame = Frame(frame.xs, (0.0, frame.ys[1]) if min(y for _, y in known) >= 0 else frame.ys)
    at_x, at_y = frame.x(known[-1][0]), frame.y(known[-1][1])
    d = "M" + " L".join(f"{frame.x(x):g} {frame.y(y):g}" for x, y in known)
    return _chart(
        name,
        frame.y_axis(_round_marks(frame.ys, 4), y_title),
        Markup(f'<path class="curve" d="{d}"/><circle class="curve-end" cx="{at_x}" cy="{at_y}" r="3.5"/>'),
        _text(at_x, at_y - 9, number(known[-1][1]), "end", "value-label"),
        frame.x_axis(_round_marks(frame.xs, 5), x_title),
    )


def curves(
    series: Sequence[tuple[str, Sequence[Sequence[Any]]]], marks: Sequence[int], x_title: str, y_title: str, name: str
) -> Markup:
    """Several curves over a count on a logarithmic scale (from 0), named above the plot; y from -.25 to 1, cut off there.

    A point is (x, y) or (x, y, low, high); the first series' interval is drawn as a band.
    """
    drawn = [(label, _known(points)) for label, points in series]
    if not any(points for _, points in drawn):
        return empty()
    last = max(x for _, points in drawn for x, *_ in points)
    frame = Frame((0.0, math.log2(1 + max(last, 1)) * 1.001), above((-0.25, 1.0), len(drawn)))

    def at(x: float, y: float) -> tuple[float, float]:
        return frame.x(math.log2(1 + x)), frame.y(min(1.0, max(-0.25, y)))

    parts = []
    for i, (label, points) in enumerate(drawn):
        if not points:
            continue
        if i == 0 and all(len(p) == 4 for p in points):
            outline = [at(x, high) for x, _, _, high in points] + [at(x, low) for x, _, low, _ in reversed(points)]
            parts.append(Markup('<path class="band" d="M{}Z"/>').format(" L".join(f"{x:g} {y:g}" for x, y in outline)))
        d = " L".join("{:g} {:g}".format(*at(p[0], p[1])) for p in points)
        parts.append(Markup('<path class="curve curve-{}" d="M{}"/>').format(i, d))
        parts.append(entry(i, label, i))
    x_marks = [(math.log2(1 + k), str(k)) for k in marks if k <= last]
    y_marks = [(v, f"{v:g}".replace("-", "\u2212")) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return _chart(name, frame.y_axis(y_marks, y_title), *parts, frame.x_axis(x_marks, x_title))


LINE = 16
"""Height of a line of names above a plot."""


def above(ys: Range, names: int) -> Range:
    """A y axis with room above it for the names of so many curves, two a line."""
    room = LINE * -(-names // 2)
    return ys[0], ys[1] + (ys[1] - ys[0]) * room / (HEIGHT - TOP - BOTTOM - room)


def entry(i: int, label: str, colour: int) -> Markup:
    """The name of the i-th curve above the plot, behind a piece of its line."""
    x, y = LEFT + 8 + (i % 2) * (WIDTH - LEFT - RIGHT) / 2, TOP + 6 + LINE * (i // 2)
    line = Markup(f'<path class="curve curve-{colour}" d="M{x:g} {y:g}h22"/>')
    return line + _text(x + 28, y + 4, label, "start", f"label curve-name-{colour}")


KEPT = {"keep": "features", "unflagged": "without flagged ones", "keep_pca": "PCA", "keep_coordinates": "coordinates"}


def keep_curves(found: dict[str, Sequence[dict[str, Any]]], name: str) -> Markup:
    """Keep K: delta_r2 against the features kept, with the rest from donors; beside it from the mean, and other lists.

    ``found`` holds rows {k, donors, mean} by the names of KEPT, each figure a {value, low, high}.
    """

    def points(curve: Sequence[dict[str, Any]], which: str) -> list[tuple[float, ...]]:
        return [(p["k"], p[which]["value"], p[which]["low"], p[which]["high"]) for p in curve]

    series = [(label, points(found[key], "donors")) for key, label in KEPT.items() if key in found]
    series.insert(1, ("features, rest at the mean", points(found["keep"], "mean")))
    return curves(series, [p["k"] for p in found["keep"]][::2], "features kept", "delta_r2", name)


def _known(points: Sequence[Sequence[Any]]) -> list[list[float]]:
    rows = [[real(v) for v in p] for p in points]
    return [[v for v in row if v is not None] for row in rows if row and None not in row]


FILE_STYLE = """
svg { background: #fdfdfc; } text { font: 12px system-ui, sans-serif; fill: #5b626d; }
.axis, .tick { stroke: #8a919c; } .grid { stroke: #e3e5e8; } .zero, .equal { stroke: #8a919c; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: #5a5470; } .band { fill: #5a5470; opacity: .15; }
.curve-1 { stroke: #1d5fa6; } .curve-2 { stroke: #a94a06; } .curve-3 { stroke: #3c7d4f; stroke-dasharray: 5 3; }
.curve-4 { stroke: #8a919c; stroke-dasharray: 2 3; } .curve-5 { stroke: #9c2f2f; stroke-dasharray: 7 3 2 3; }
.curve-name-1 { fill: #1d5fa6; } .curve-name-2 { fill: #a94a06; } .curve-name-3 { fill: #3c7d4f; }
.curve-name-5 { fill: #9c2f2f; } .curve-name-0 { fill: #5a5470; font-weight: 600; }
"""
"""The style of a figure that stands in a file of its own; within a page style.css has it."""


def as_file(svg: Markup) -> str:
    """A chart as an SVG file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    return str(svg).replace("<svg", head, 1).replace(">", f"><style>{FILE_STYLE}</style>", 1) + "\n"


# ── figures of a row, in percent of its width


def _share(value: float, span: Range) -> float:
    return round(100 * min(1.0, max(0.0, (value - span[0]) / (span[1] - span[0]))), 2)


def _row(name: str, *parts: Markup, css: str = "row-figure", height: int = ROW) -> Markup:
    head = Markup('<svg class="{}" width="100%" height="{}" role="img" aria-label="{}">').format(css, height, name)
    return head + Markup("").join(parts) + Markup("</svg>")


def forest_bar(value: Any, low: Any, high: Any, span: Range, bound: float | None = None, muted: bool = False) -> Markup:
    """A bar from 0 to the value and its 95 % interval as a whisker, on the x scale that all rows share.

    ``bound`` shades the band of effects too small to claim.
    """
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
    parts.append(Markup(f'<line class="zero" x1="{zero}%" x2="{zero}%" y1="0" y2="{ROW}"/>'))
    start, width = min(zero, at), abs(at - zero)
    box = f'x="{start}%" y="{middle - 4}" width="{width:.2f}%" height="8" rx="1"'
    parts.append(Markup(f'<rect class="effect {css}" {box}/>'))
    if low is not None and high is not None:
        a, b = _share(low, span), _share(high, span)
        whisker = f'<line class="whisker" x1="{a}%" x2="{b}%" y1="{middle}" y2="{middle}"/>'
        ends = (f'<line class="whisker" x1="{e}%" x2="{e}%" y1="{middle - 4}" y2="{middle + 4}"/>' for e in (a, b))
        parts.append(Markup(whisker + "".join(ends)))
    between = f", 95 % interval {number(low)} to {number(high)}" if low is not None and high is not None else ""
    return _row(f"{number(value, plus=True)} reward{between}", *parts)


def forest_axis(span: Range, about: int = 4) -> Markup:
    """The labelled scale above a column of forest bars."""
    parts = []
    for value, text in _round_marks(span, about):
        at = _share(value, span)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        parts.append(Markup('<text class="label" x="{}%" y="12" text-anchor="{}">{}</text>').format(at, anchor, text))
        parts.append(Markup(f'<line class="tick" x1="{at}%" x2="{at}%" y1="17" y2="{ROW}"/>'))
    return _row("scale, reward", *parts)


def stacked_bar(parts: Sequence[tuple[str, Any]]) -> Markup:
    """Shares of 1 laid end to end: positive ones to the right of 0, negative ones to its left."""
    known = [(name, v) for name, v in ((name, real(v)) for name, v in parts) if v is not None]
    if not known:
        return empty()
    right, left = sum(v for _, v in known if v > 0), sum(v for _, v in known if v < 0)
    span = (min(0.0, left), max(1.0, right))
    height, drawn, ahead, behind = 34, [], 0.0, 0.0
    for name, v in known:
        start = ahead if v >= 0 else behind + v
        ahead, behind = (ahead + v, behind) if v >= 0 else (ahead, behind + v)
        x, width = _share(start, span), _share(start + abs(v), span) - _share(start, span)
        tip = Markup("<title>{}: {} %</title>").format(name, number(100 * v))
        shape = Markup('<rect class="part part-{}" x="{}%" y="4" width="{}%" height="26">')
        drawn.append(shape.format(name, x, f"{width:.2f}") + tip + Markup("</rect>"))
    zero = _share(0.0, span)
    drawn.append(Markup(f'<line class="zero" x1="{zero}%" x2="{zero}%" y1="0" y2="{height}"/>'))
    name = ", ".join(f"{n} {number(100 * v)} %" for n, v in known)
    return _row(name, *drawn, css="row-figure stacked", height=height)
