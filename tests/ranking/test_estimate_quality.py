"""Estimate quality: 1 for a perfect estimate, -1 for a reversed one, and samples that represent the whole population."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmscope.ranking.estimate_quality import PER_RESPONSE, estimate_quality, sample


def table(effect: np.ndarray, estimate: np.ndarray, weight: np.ndarray | None = None) -> pl.DataFrame:
    """One row per (response, feature) of ``effect`` [responses, features]; two responses per prompt."""
    at, feature = np.divmod(np.arange(effect.size), effect.shape[1])
    return pl.DataFrame(
        {
            "response": [f"r{i}" for i in at],
            "prompt": [f"p{i // 2}" for i in at],
            "feature": feature,
            "estimate": estimate.ravel(),
            "effect": effect.ravel(),
            "weight": np.ones(effect.size) if weight is None else weight.ravel(),
        }
    )


@pytest.fixture
def effect() -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, size=(12, 40))


def test_a_perfect_estimate_has_trust_1(effect: np.ndarray) -> None:
    found = estimate_quality(table(effect, effect), 1.0, 0.0)
    assert found.spearman_median == found.spearman_low == found.spearman_high == pytest.approx(1.0)
    assert found.spearman_p10 == found.spearman_features == pytest.approx(1.0)
    assert found.sign_agreement == 1.0
    assert found.relative_error == found.top_missed == found.top_missed_high == 0.0
    assert (found.responses, found.features) == (12, 480)


def test_a_reversed_estimate_has_trust_minus_1_and_the_wrong_signs(effect: np.ndarray) -> None:
    found = estimate_quality(table(effect, -effect), 1.0, 0.0)
    assert found.spearman_median == found.spearman_p10 == found.spearman_features == pytest.approx(-1.0)
    assert found.sign_agreement == 0.0
    assert found.top_missed == 0.0  # the top is by size


def test_an_unrelated_estimate_has_trust_around_0(effect: np.ndarray) -> None:
    found = estimate_quality(table(effect, np.random.default_rng(1).normal(size=effect.shape)), 1.0, 0.0)
    assert abs(found.spearman_median) < 0.2
    assert found.spearman_low < 0.05
    assert 0.35 < found.sign_agreement < 0.65
    assert found.top_missed > 0.5
    assert found.top_missed_high > found.top_missed


def test_a_sample_that_is_good_across_responses_but_not_within_them_is_not_trusted() -> None:
    """Pooled correlation would be near 1: the responses differ in size, the features within them are shuffled."""
    rng = np.random.default_rng(0)
    level = np.linspace(-10, 10, 12)[:, None]
    found = estimate_quality(
        table(level + 0.1 * rng.normal(size=(12, 40)), level + 0.1 * rng.normal(size=(12, 40))), 1.0, 0.0
    )
    assert abs(found.spearman_median) < 0.25


def test_effects_below_the_noise_floor_count_as_0(effect: np.ndarray) -> None:
    small = np.where(np.abs(effect) < 0.5, effect, 0.0)
    estimate = np.where(np.abs(effect) < 0.5, -effect, effect)
    assert estimate_quality(table(effect, estimate), 1.0, 0.0).sign_agreement < 0.9
    assert estimate_quality(table(effect, estimate), 1.0, 0.5).sign_agreement == 1.0
    assert np.isnan(estimate_quality(table(small, estimate), 1.0, 0.5).sign_agreement)


def test_signs_are_asked_only_where_the_effect_is_large_against_sd(effect: np.ndarray) -> None:
    estimate = np.where(np.abs(effect) < 0.2, -effect, effect)
    assert estimate_quality(table(effect, estimate), 20.0, 0.0).sign_agreement == 1.0
    assert estimate_quality(table(effect, estimate), 1.0, 0.0).sign_agreement < 1.0


def test_the_relative_error_is_a_weighted_median() -> None:
    effect = np.full((1, 10), 1.0)
    estimate = np.array([[1.0] * 6 + [2.0] * 4])
    assert estimate_quality(table(effect, estimate), 1.0, 0.0).relative_error == 0.0
    weight = np.array([[1.0] * 6 + [2.0] * 4])
    assert estimate_quality(table(effect, estimate, weight), 1.0, 0.0).relative_error == pytest.approx(1 / 1.01)


def test_the_missed_share_of_the_top() -> None:
    """Ten of 100 are the true top; the estimate swaps three of them for others."""
    effect = np.arange(100.0)[None] + 1
    estimate = effect.copy()
    estimate[0, [90, 95, 99]] = 0.5
    assert estimate_quality(table(effect, estimate), 1.0, 0.0).top_missed == pytest.approx(0.3)


def test_responses_with_few_features_give_no_spearman(effect: np.ndarray) -> None:
    found = estimate_quality(table(effect[:, :7], effect[:, :7]), 1.0, 0.0)
    assert found.responses == 0
    assert np.isnan(found.spearman_median)


def test_the_order_of_rows_does_not_matter(effect: np.ndarray) -> None:
    rows = table(effect, effect + np.random.default_rng(2).normal(size=effect.shape))
    found = estimate_quality(rows, 1.0, 0.1)
    assert estimate_quality(rows, 1.0, 0.1) == found
    shuffled = estimate_quality(rows.sort("feature", "response"), 1.0, 0.1)
    assert shuffled.spearman_median == pytest.approx(found.spearman_median)
    assert shuffled.relative_error == pytest.approx(found.relative_error)


@given(st.integers(1, 400), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]), st.integers(0, 2**32 - 1))
def test_weights_sum_to_the_population_and_the_sample_keeps_its_size(total: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimate = rng.normal(size=total)
    picked, weight = sample(estimate, np.abs(estimate) + noise * rng.exponential(size=total), PER_RESPONSE, rng)
    assert weight.sum() == pytest.approx(total)
    assert len(set(picked.tolist())) == picked.size == min(total, picked.size)
    assert picked.size <= PER_RESPONSE
    assert (weight >= 1).all()
    assert 0 <= picked.min() <= picked.max() < total


def test_large_estimates_and_large_masses_are_each_in_the_sample() -> None:
    rng = np.random.default_rng(0)
    estimate, mass = rng.normal(size=400), rng.exponential(size=400)
    picked, _ = sample(estimate, mass, PER_RESPONSE, rng)
    for values in (np.abs(estimate), mass):
        quartile = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values[picked])
        assert np.bincount(quartile, minlength=4).tolist() == [PER_RESPONSE // 4] * 4


def test_a_weighted_sample_estimates_the_populations_mean() -> None:
    rng = np.random.default_rng(0)
    estimate, mass = rng.normal(size=300), rng.exponential(size=300)
    value = estimate**2 + mass
    means = []
    for seed in range(200):
        picked, weight = sample(estimate, mass, PER_RESPONSE, np.random.default_rng(seed))
        means.append((weight * value[picked]).sum() / weight.sum())
    assert np.mean(means) == pytest.approx(value.mean(), rel=0.02)
