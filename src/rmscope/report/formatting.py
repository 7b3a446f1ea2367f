"""Numbers as the report writes them: two to three significant digits, a true minus sign, the interval beside it.

A value that is missing or not finite is a dash, never 0. A value and its interval have the same decimals.
"""

from __future__ import annotations

import math
from typing import Any

MINUS = "\u2212"
MISSING = "\u2013"
THIN = "\u202f"
"""A narrow space that does not break, between a number and its percent sign."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def real(value: Any) -> float | None:
    """The value as a finite float, else None. JSON has no nan, but tables in memory do."""
    if value is None or isinstance(value, (str, bool)):
        return None
    value = float(value)
    return value if abs(value) < 1e300 else None  # no nan, no infinity, and nothing that becomes one as a percentage


def decimals_for(*values: float | None) -> int:
    """Decimals that show the largest of the values with three digits, or two where it is below 1."""
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    if largest == 0:
        return 2
    exponent = math.floor(math.log10(largest))
    return max(0, 2 - exponent) if exponent >= 0 else 1 - exponent


def fixed(value: float, decimals: int, plus: bool = False) -> str:
    """Fixed decimals with a true minus; a value that rounds to zero has no sign."""
    text = f"{abs(value):,.{decimals}f}".replace(",", THIN)
    if not float(f"{abs(value):.{decimals}f}"):
        return text
    return (MINUS if value < 0 else "+" if plus else "") + text


def number(value: Any, plus: bool = False) -> str:
    """0.42, 1.42, 12.3, 4.2 × 10⁻⁵; with ``plus`` the sign is always shown."""
    value = real(value)
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 1e-4:
        return fixed(value, decimals_for(value), plus)
    mantissa, exponent = f"{abs(value):.1e}".split("e")
    sign = MINUS if value < 0 else "+" if plus else ""
    return f"{sign}{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"


def signed(value: Any) -> str:
    return number(value, plus=True)


def count(value: Any) -> str:
    value = real(value)
    return MISSING if value is None else fixed(value, 0)


def percent(value: Any) -> str:
    """A share as a percentage; a share that is not 0 is not written as 0 %."""
    value = real(value)
    if value is None:
        return MISSING
    if 0 < abs(value) < 5e-4:
        return f"<{THIN}0.1{THIN}%" if value > 0 else f"{MINUS}<{THIN}0.1{THIN}%"
    return f"{fixed(100 * value, _percent_decimals(value))}{THIN}%"


def _percent_decimals(*shares: float | None) -> int:
    return 1 if max((abs(s) for s in shares if s is not None), default=0) < 0.9995 else 0


def interval(low: float, high: float, decimals: int) -> str:
    return f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def effect(value: Any, low: Any = None, high: Any = None) -> tuple[str, str]:
    """(+0.42, [0.35, 0.50]): a signed value and its interval, with the same decimals; '' without one.

    The interval's width has two digits, since more would be noise, and the value at most three.
    """
    value, low, high = real(value), real(low), real(high)
    if value is None or low is None or high is None:
        return signed(value), ""
    places = decimals_for(value, low, high)
    if high > low:
        two_of_width = 1 - math.floor(math.log10(high - low))
        three_of_value = 2 - math.floor(math.log10(abs(value))) if value else two_of_width
        places = max(0, min(two_of_width, three_of_value))
    if places > 5:
        return signed(value), f"[{number(low)}, {number(high)}]"
    return fixed(value, places, plus=True), interval(low, high, places)


def estimate(value: Any, low: Any = None, high: Any = None) -> tuple[str, str]:
    """(0.93, [0.90, 0.95]): as :func:`effect`, without the plus."""
    text, between = effect(value, low, high)
    return text.removeprefix("+"), between


def share(value: Any, low: Any = None, high: Any = None) -> tuple[str, str]:
    """(61.2 %, [57.8, 64.5]); whole percents where the interval is 10 points wide or more."""
    value, low, high = real(value), real(low), real(high)
    if value is None or low is None or high is None:
        return percent(value), ""
    places = 0 if high - low >= 0.1 else _percent_decimals(value, low, high)
    return f"{fixed(100 * value, places)}{THIN}%", interval(100 * low, 100 * high, places)


def q_value(value: Any) -> str:
    value = real(value)
    if value is None:
        return MISSING
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def shift(before: Any, after: Any) -> tuple[str, str]:
    """Two rewards with 2 or 3 decimals, enough to show two digits of their difference."""
    places = min(3, max(2, decimals_for(change(before, after))))
    return tuple(MISSING if v is None else fixed(v, places) for v in map(real, (before, after)))  # type: ignore[return-value]


def change(before: Any, after: Any) -> float | None:
    """before - after: the ablation effect, if ``after`` is the reward after the ablation."""
    before, after = real(before), real(after)
    return None if before is None or after is None else before - after


def duration(seconds: Any) -> str:
    value = real(seconds)
    if value is None:
        return MISSING
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
