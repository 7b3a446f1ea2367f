"""The filter on |Δr|: which pairs stay, and how many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmscope.pairs.pair import filtered_count, largest_differences

DELTA = np.array([0.5, -3.0, 2.0, -0.1, 2.0, 3.0])


@pytest.mark.parametrize(
    ("share", "most", "places"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        (None, 1, [1]),
        (None, 3, [1, 2, 5]),
        (0.5, None, [1, 2, 5]),
        (0.5, 2, [1, 5]),
        (0.4, 4, [1, 5]),
        (0.01, None, [1]),
        (1.0, 100, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_largest_stay_in_file_order_and_of_equals_the_first(
    share: float | None, most: int | None, places: list[int]
) -> None:
    assert largest_differences(DELTA, share, most) == places


@given(st.lists(st.floats(-9, 9), min_size=1), st.floats(0.01, 1), st.integers(1, 60))
def test_no_pair_that_is_left_out_is_farther_apart_than_one_that_stays(delta: list[float], share: float, most: int) -> None:
    places = largest_differences(np.array(delta), share, most)
    out = [abs(d) for i, d in enumerate(delta) if i not in places]
    assert len(places) == filtered_count(len(delta), share, most) <= most
    assert min(abs(delta[i]) for i in places) >= max(out, default=0.0)


def test_the_reference_studys_decile_is_that_of_its_158_866_pairs() -> None:
    assert filtered_count(158_866, 0.1, None) == 15_886
