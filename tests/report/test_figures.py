"""Figures hold finite coordinates only, for any input, and escape the text they are given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from rmscope.report import figures as fig

ANY = st.one_of(st.sampled_from((None, math.nan, math.inf)), st.floats(-1e9, 1e9), st.integers(-5, 5))
HOSTILE = '<script>alert("x")</script>'


def check(svg: Markup) -> None:
    """The markup parses as XML, and each coordinate is a finite number."""
    assert isinstance(svg, Markup)
    if not svg:
        return
    ET.fromstring(str(svg))
    coordinates = " ".join(re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|r|d|width|height)="([^"]*)"', svg))
    assert not re.search(r"nan|inf|none", coordinates, re.IGNORECASE)
    for w in re.findall(r' width="([^"%]*)%?"', svg):
        assert float(w) >= 0


EMPTY = [[], [[None, 1.0]], [[math.nan, math.inf]], [[0.5, 0.5]], [[0, 0]], [[1, 1], [1, 1]], [[-1e-9, 1e-9]]]


@pytest.mark.parametrize("points", EMPTY)
def test_charts_of_few_or_no_points(points: list) -> None:
    check(fig.scatter(points, "x", "y", "name"))
    check(fig.line(points, "x", "y", "name"))


@pytest.mark.parametrize(
    ("edges", "counts"), [([], []), ([0], []), ([0, 1], [5]), ([0, 1], [0]), ([1, 1], [3]), ([0, None], [2])]
)
def test_histograms_of_few_or_no_bars(edges: list, counts: list) -> None:
    check(fig.histogram(edges, counts, "x", "name"))


@given(st.lists(st.tuples(ANY, ANY), max_size=8))
def test_charts_of_any_points(points: list) -> None:
    check(fig.scatter(points, "x", "y", "name"))
    check(fig.line(points, "x", "y", "name"))


@given(ANY, ANY, ANY, ANY)
def test_forest_bars_of_any_interval(value: object, low: object, high: object, bound: object) -> None:
    span = fig.extent([value, low, high], include=[0.0], pad=0.04)
    assert span[0] < span[1]
    check(fig.forest_bar(value, low, high, span, bound))  # type: ignore[arg-type]
    check(fig.forest_axis(span))


@given(st.lists(st.tuples(st.sampled_from(("features", "error", "gap")), ANY), max_size=4))
def test_stacked_bars_of_any_shares(parts: list) -> None:
    check(fig.stacked_bar(parts))


def test_text_is_escaped() -> None:
    for svg in (
        fig.histogram([0, 1], [2], HOSTILE, HOSTILE),
        fig.scatter([[0.1, 0.2]], HOSTILE, HOSTILE, HOSTILE),
        fig.line([[0, 1]], HOSTILE, HOSTILE, HOSTILE),
        fig.stacked_bar([(HOSTILE, 1.0)]),
    ):
        assert "<script" not in svg
        check(svg)


def test_a_bar_ends_where_its_value_lies_on_the_shared_scale() -> None:
    svg = fig.forest_bar(0.5, 0.25, 0.75, (-1.0, 1.0))
    assert 'class="effect up" x="50.0%"' in svg
    assert 'width="25.00%"' in svg
    assert 'x1="62.5%" x2="87.5%"' in svg
    assert 'aria-label="+0.50 reward, 95 % interval 0.25 to 0.75"' in svg


def test_what_is_not_significant_has_no_hue() -> None:
    svg = fig.forest_bar(-0.5, -0.9, 0.1, (-1.0, 1.0), muted=True)
    assert "effect muted" in svg
    assert "effect down" not in svg


def test_negative_shares_lie_left_of_zero() -> None:
    svg = fig.stacked_bar([("features", 1.25), ("error", -0.25)])
    assert 'part-error" x="0.0%"' in svg
    assert 'part-features" x="16.67%"' in svg


def test_ticks_are_round_and_inside() -> None:
    assert fig.ticks(-1.4, 1.5, 4) == [-1.0, 0.0, 1.0]
    assert fig.tick_labels([-0.5, 0.0, 0.5]) == ["\u22120.5", "0", "0.5"]


@given(st.lists(st.tuples(st.integers(0, 4096), ANY, ANY, ANY), max_size=6), st.lists(st.tuples(st.integers(0, 99), ANY)))
def test_curves_hold_finite_coordinates(first: list, second: list) -> None:
    svg = fig.curves([(HOSTILE, first), ("two", second)], (0, 8, 64), "K", "share", "curves")
    check(svg)
    assert "<script>" not in svg
    if "<svg" in svg:
        check(Markup(fig.as_file(svg)))


def test_names_of_curves_stand_above_every_point() -> None:
    """A curve that runs along the top and fills the plot, under any number of names."""
    for n in range(1, 7):
        svg = fig.curves([(str(i), [(0, 1.0), (64, 1.0)]) for i in range(n)], (0, 64), "K", "share", "curves")
        heights = [float(y) for y in re.findall(r'<path class="curve[^"]*" d="M[\d.]+ ([\d.]+) L', svg)]
        names = [float(y) for y in re.findall(r'class="label curve-name-\d" x="[\d.]+" y="([\d.]+)"', svg)]
        assert len(heights) == len(names) == n
        assert max(names) < min(heights)


def test_curves_are_named_apart() -> None:
    svg = fig.curves([(n, [(0, 0.1), (8, 0.9)]) for n in "abc"], (0, 8), "K", "share", "curves")
    names = [float(y) for y in re.findall(r'curve-name-\d" x="[^"]*" y="([^"]*)"', svg)]
    assert len(names) == 3
    assert min(abs(a - b) for a in names for b in names if a != b) >= 12
