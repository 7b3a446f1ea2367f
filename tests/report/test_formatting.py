"""Numbers carry two to three digits, a true minus and their interval; what is missing is a dash."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmscope.report.formatting import (
    MISSING,
    THIN,
    count,
    duration,
    effect,
    estimate,
    number,
    percent,
    q_value,
    share,
    shift,
    signed,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4213, "0.42"),
        (1.4213, "1.42"),
        (-12.34, "\u221212.3"),
        (0.0071, "0.0071"),
        (4.2e-5, "4.2 × 10⁻⁵"),
        (-2.61e-6, "\u22122.6 × 10⁻⁶"),
        (1234567, f"1{THIN}234{THIN}567"),
        (0, "0"),
        (None, MISSING),
        (math.nan, MISSING),
        (math.inf, MISSING),
    ],
)
def test_numbers_have_two_to_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signs_are_always_shown_for_effects() -> None:
    assert signed(0.42) == "+0.42"
    assert signed(-0.42) == "\u22120.42"


@pytest.mark.parametrize(
    ("triple", "text"),
    [
        ((0.4213, 0.35, 0.4988), ("+0.42", "[0.35, 0.50]")),
        ((-0.09, -0.114, -0.061), ("\u22120.090", "[\u22120.114, \u22120.061]")),
        ((0.09, -0.05, 0.24), ("+0.09", "[\u22120.05, 0.24]")),
        ((0.003, -0.2, 0.21), ("0.00", "[\u22120.20, 0.21]")),
        ((0.42, None, 0.5), ("+0.42", "")),
        ((None, None, None), (MISSING, "")),
        ((12.3, 11.1, 13.4), ("+12.3", "[11.1, 13.4]")),
    ],
)
def test_an_effect_and_its_interval_share_their_decimals(triple: tuple, text: tuple[str, str]) -> None:
    assert effect(*triple) == text


def test_estimates_have_no_plus() -> None:
    assert estimate(0.934, 0.921, 0.947) == ("0.934", "[0.921, 0.947]")


def test_shares_are_percentages() -> None:
    assert share(0.683, 0.656, 0.709) == (f"68.3{THIN}%", "[65.6, 70.9]")
    assert share(0.71, 0.58, 0.83) == (f"71{THIN}%", "[58, 83]")
    assert percent(1.0) == f"100{THIN}%"
    assert percent(0.0001) == f"<{THIN}0.1{THIN}%"
    assert percent(None) == MISSING


def test_rewards_before_and_after_show_their_difference() -> None:
    assert shift(1.42, 0.98) == ("1.42", "0.98")
    assert shift(1.4213, 1.4262) == ("1.421", "1.426")
    assert shift(None, -1.0) == (MISSING, "\u22121.00")


def test_small_q_is_not_written_as_zero() -> None:
    assert q_value(0.0002) == "< .001"
    assert q_value(0.0182) == ".018"
    assert q_value(None) == MISSING


def test_counts_and_durations() -> None:
    assert count(1204) == f"1{THIN}204"
    assert duration(341.7) == "5 min 42 s"
    assert duration(12) == "12 s"
    assert duration(3_700) == "1 h 01 min"


@given(st.floats(), st.floats(), st.floats())
def test_every_float_has_a_text(value: float, low: float, high: float) -> None:
    for text in (number(value), *effect(value, low, high), percent(value), q_value(value)):
        assert "nan" not in text
        assert "inf" not in text
        assert "-" not in text
