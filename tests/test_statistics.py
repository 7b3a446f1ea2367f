"""The statistics of trust and ranking, against scipy, hand-written twins, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rmscope.statistics import (
    FEW,
    FLIPS,
    benjamini_hochberg,
    bootstrap,
    correlation,
    flip_matrix,
    mean_interval,
    q_values_of,
    sign_flip_p,
    studentised_p,
    weighted_spearman,
)  # fmt: skip

ITEMS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 5)), min_size=2, max_size=15)


@given(ITEMS)
def test_weighted_spearman_is_scipys_on_the_list_with_items_repeated(items: list[tuple[int, int, int]]) -> None:
    a, b, w = (np.array(column, dtype=float) for column in zip(*items, strict=True))
    found = weighted_spearman(a, b, w)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(found)
    else:
        expected = stats.spearmanr(np.repeat(a, w.astype(int)), np.repeat(b, w.astype(int))).statistic
        assert found == pytest.approx(expected, abs=1e-9)


def test_weights_matter_to_spearman_and_their_scale_does_not() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0])
    assert weighted_spearman(a, b, np.array([9.0, 9.0, 1.0, 1.0])) > weighted_spearman(a, b, np.array([1.0, 1.0, 9.0, 9.0]))
    w = np.array([0.2, 1.7, 3.0, 0.4])
    assert weighted_spearman(a, b, w) == pytest.approx(weighted_spearman(a, b, 17 * w))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_q_values_are_benjamini_and_hochbergs(p: list[float]) -> None:
    q = benjamini_hochberg(np.array(p))
    n = len(p)
    for i in range(n):  # the smallest n p_(k) / k over all ranks k at or above i's own
        expected = min(n * x / sum(y <= x for y in p) for x in p if x >= p[i])
        assert q[i] == pytest.approx(min(1.0, expected))


def test_no_p_values_have_no_q_values() -> None:
    assert benjamini_hochberg(np.array([])).size == 0


def test_sign_flip_p_is_uniform_under_the_null_and_small_under_an_effect() -> None:
    rng = np.random.default_rng(0)
    signs = flip_matrix(24, 1)
    null = np.array([sign_flip_p(rng.normal(size=24), signs) for _ in range(400)])
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert 0.02 < (null < 0.05).mean() < 0.09
    planted = np.array([sign_flip_p(rng.normal(1.0, 1.0, size=24), signs) for _ in range(50)])
    assert (planted < 0.01).mean() > 0.9
    reversed_ = np.array([sign_flip_p(rng.normal(-1.0, 1.0, size=24), signs) for _ in range(50)])
    assert reversed_.min() > 0.5


def test_sign_flip_p_is_exact_on_few_values() -> None:
    """Five equal values: only the all-plus flips reach the observed sum, one in 32; no flip at all is beaten by zeros."""
    signs = flip_matrix(5, 3)
    assert sign_flip_p(np.full(5, 0.3), signs) == pytest.approx(1 / 32, rel=0.2)
    assert sign_flip_p(np.zeros(5), signs) == 1.0
    assert sign_flip_p(np.full(40, 1.0), flip_matrix(40, 0)) == pytest.approx(1 / (1 + FLIPS))


@pytest.mark.parametrize("n", [24, 64])
def test_the_studentised_p_holds_under_skew_where_flips_reject_too_often(n: int) -> None:
    """Of skewed values whose mean is 0, one in twenty may be told to be above it: exponential with its tail to the left."""
    rng = np.random.default_rng(0)
    signs, drawn = flip_matrix(n, 1), 1 - rng.exponential(size=(400, n))
    flips, studentised = (np.array([p(v) for v in drawn]) for p in (lambda v: sign_flip_p(v, signs), studentised_p))
    assert (studentised < 0.05).mean() < 0.085
    assert (studentised < 0.05).mean() < 0.75 * (flips < 0.05).mean()


def test_the_studentised_p_is_uniform_under_the_null_and_small_under_an_effect() -> None:
    rng = np.random.default_rng(0)
    null = np.array([studentised_p(rng.normal(size=24)) for _ in range(400)])
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert (np.array([studentised_p(rng.normal(1.0, 1.0, size=24)) for _ in range(50)]) < 0.01).mean() > 0.9
    assert studentised_p(np.ones(24)) == pytest.approx(1 / (1 + FLIPS))
    assert studentised_p(np.zeros(24)) == 1.0
    assert studentised_p(np.ones(FEW - 1)) == 1.0


def test_a_studentised_interval_covers_a_skewed_mean_better_than_percentiles() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.exponential(size=(400, 20))
    ends = np.array([mean_interval(v) for v in drawn])
    percentiles = np.percentile(drawn[:, rng.integers(0, 20, (1000, 20))].mean(2), [2.5, 97.5], axis=1).T
    covered, before = (((e[:, 0] < 1) & (e[:, 1] > 1)).mean() for e in (ends, percentiles))
    assert covered > 0.92 > before


def test_q_values_of_a_family_are_those_of_benjamini_and_hochberg() -> None:
    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(q_values_of(p, p), benjamini_hochberg(p))
    assert q_values_of(np.array([p.max() + 1e-9]), p)[0] == 1.0
    assert q_values_of(np.array([0.5]), p[:0]).tolist() == [1.0]


def test_an_interval_of_values_that_are_nearly_equal_but_for_one_stays_within_their_range() -> None:
    values = np.r_[np.linspace(-1e-6, 1e-6, 8), -0.3]
    low, high = mean_interval(values)
    assert values.min() <= low < values.mean() < high <= values.max()


def test_flips_are_signs_and_the_same_for_the_same_seed() -> None:
    signs = flip_matrix(30, 5)
    assert set(np.unique(signs)) == {-1, 1}
    assert signs.shape == (FLIPS, 30)
    assert abs(signs.mean()) < 0.01
    assert np.array_equal(signs, flip_matrix(30, 5))
    assert not np.array_equal(signs, flip_matrix(30, 6))


def test_a_mean_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    intervals = np.array([mean_interval(rng.normal(2.0, 1.0, size=40), seed=i) for i in range(200)])
    covered = ((intervals[:, 0] < 2.0) & (intervals[:, 1] > 2.0)).mean()
    assert 0.88 < covered < 0.99


def test_the_bootstrap_resamples_groups_not_items() -> None:
    """Ten groups of 50 near-copies: by group the mean's interval covers; by item it would be far too narrow."""
    rng = np.random.default_rng(0)
    covered, narrow = [], []
    for seed in range(16):
        values = np.repeat(rng.normal(size=10), 50) + 0.01 * rng.normal(size=500)
        low, high = bootstrap(values, np.repeat(np.arange(10), 50), lambda v: float(v.mean()), seed)
        covered.append(low < 0.0 < high)
        few_low, few_high = bootstrap(values, np.arange(500), lambda v: float(v.mean()), seed)
        narrow.append((few_high - few_low) / (high - low))
    assert np.mean(covered) > 0.7
    assert np.median(narrow) < 0.3


def test_the_bootstrap_takes_groups_of_any_name_and_rows_of_several_columns() -> None:
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    groups = np.array(["b", "a", "b", "a"])
    low, high = bootstrap(values, groups, lambda v: float(v[:, 1].mean()))
    assert (low, high) == (20.0, 30.0)  # b b has 20, a a has 30, a b has 25


def test_correlation_is_pearsons_and_0_where_nothing_varies() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(size=30)
    assert correlation(a, a + b) == pytest.approx(stats.pearsonr(a, a + b).statistic)
    assert correlation(a, np.ones(30)) == correlation(a[:2], b[:2]) == 0.0
