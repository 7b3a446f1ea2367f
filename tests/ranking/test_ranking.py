"""Ranking: what is proposed, what is measured, and what is reported."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmscope
from rmscope.model.scores import Scores
from rmscope.pairs.pair import Pair, split_of
from rmscope.ranking.candidates import (
    ELIGIBLE_PROMPTS,
    candidates,
    firing_counts,
    first_responses,
    freeze,
    pairs_a_prompt,
    preference_signs,
)
from rmscope.ranking.confirm import BOUND, confirm, power, power_statement
from rmscope.statistics import FEW, studentised_p
from tests.ranking.ranked import frozen, measured, ranked


def firings(rng: np.random.Generator, features: int, prompts: int, pairs: int, rate: float) -> pl.DataFrame:
    """Which features fire in which response; the responses have one random order."""
    rows = [
        (f, f"p{p}", f"p{p}-{i}", side)
        for p in range(prompts)
        for i in range(pairs)
        for side in ("chosen", "rejected")
        for f in range(features)
        if rng.random() < rate
    ]
    table = pl.DataFrame(rows, schema=["feature", "prompt", "pair", "side"], orient="row")
    keys = table.select("pair", "side").unique(maintain_order=True)
    return table.join(keys.with_columns(pl.Series("order", rng.permutation(keys.height))), on=["pair", "side"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_first_responses_keep_the_limit_and_take_new_prompts_first(limit: int, prompts: int, pairs: int, seed: int) -> None:
    table = firings(np.random.default_rng(seed), 4, prompts, pairs, 0.6)
    found = first_responses(table, [0, 1, 3], limit)
    assert set(found["feature"].unique()) <= {0, 1, 3}
    for feature in (0, 1, 3):
        mine, all_ = found.filter(pl.col("feature") == feature), table.filter(pl.col("feature") == feature)
        assert mine.height == min(limit, all_.height)
        assert mine.select("pair", "side").is_duplicated().sum() == 0
        assert mine.select("pair", "side").join(all_, on=["pair", "side"], how="anti").height == 0
        per_prompt = {p: (mine["prompt"] == p).sum() for p in all_["prompt"].unique()}
        available = {p: (all_["prompt"] == p).sum() for p in per_prompt}
        most = max(per_prompt.values(), default=0)
        assert all(n >= min(most - 1, available[p]) for p, n in per_prompt.items())
        for p, n in per_prompt.items():  # within a prompt, the earliest of the common order
            orders = sorted(all_.filter(pl.col("prompt") == p)["order"])
            assert sorted(mine.filter(pl.col("prompt") == p)["order"]) == orders[:n]


def test_features_walk_through_the_responses_in_one_order() -> None:
    """Two features that fire everywhere are measured in the same responses."""
    found = first_responses(firings(np.random.default_rng(0), 2, 30, 3, 1.1), [0, 1], 16)
    left, right = (set(found.filter(pl.col("feature") == f).select("pair", "side").iter_rows()) for f in (0, 1))
    assert len(left) == 16
    assert left == right


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_pairs_a_prompt_with_both_of_their_sides(limit: int, prompts: int, pairs: int, most: int, seed: int) -> None:
    table = firings(np.random.default_rng(seed), 3, prompts, pairs, 0.5)
    found = pairs_a_prompt(table, [0, 2], limit, most)
    assert set(found["feature"].unique()) <= {0, 2}
    for feature in (0, 2):
        mine, all_ = found.filter(pl.col("feature") == feature), table.filter(pl.col("feature") == feature)
        by_prompt = mine.group_by("prompt").agg(pl.col("pair").n_unique())
        assert by_prompt.height == min(limit, all_["prompt"].n_unique())
        there = all_.group_by("prompt").agg(pl.col("pair").n_unique().alias("there"))
        assert (
            by_prompt.join(there, on="prompt").filter(pl.col("pair") != pl.min_horizontal("there", pl.lit(most))).is_empty()
        )
        one = pairs_a_prompt(table, [feature], limit)
        assert one.join(mine, on=["pair", "side"], how="anti").is_empty()  # more pairs are added to the first ones
        everything = all_.join(mine.select("pair").unique(), on="pair", how="semi")
        assert mine.height == everything.height  # every side of a chosen pair on which the feature fires


def estimates(means: dict[int, float], prompts: dict[int, int]) -> pl.DataFrame:
    rows = [(f, f"p{p}", means[f] + 0.01 * p, abs(means[f])) for f in means for p in range(prompts.get(f, 25))]
    return pl.DataFrame(rows, schema=["feature", "prompt", "effect", "mass"], orient="row")


def test_candidates_are_the_largest_both_ways_among_features_of_enough_prompts() -> None:
    means = {0: 3.0, 1: 2.0, 2: -5.0, 3: -1.0, 4: 9.0, 5: 1.0}
    table = estimates(means, {4: ELIGIBLE_PROMPTS - 1, 5: ELIGIBLE_PROMPTS})
    assert candidates(table, 10, 0, 0) == {"up": [0, 1, 5], "down": [2, 3], "others": []}
    found = candidates(table, 1, 2, 0)
    assert (found["up"], found["down"]) == ([0], [2])
    assert len(found["others"]) == 2
    assert set(found["others"]) <= {1, 3, 4, 5}


def test_the_other_features_are_a_seeded_sample_over_all_sizes() -> None:
    rng = np.random.default_rng(0)
    table = estimates({f: float(rng.normal()) for f in range(400)}, {})
    others = [candidates(table, 20, 80, seed)["others"] for seed in (0, 0, 1)]
    assert others[0] == others[1] != others[2]
    assert len(set(others[0])) == len(others[0])
    assert len(others[0]) == 80
    proposed = candidates(table, 20, 80, 0)
    assert not set(others[0]) & {*proposed["up"], *proposed["down"]}
    sizes = (
        table.group_by("feature")
        .agg(pl.col("effect").mean().abs())
        .filter(~pl.col("feature").is_in(proposed["up"] + proposed["down"]))
    )
    quartile = np.searchsorted(
        np.quantile(sizes["effect"], [0.25, 0.5, 0.75]), sizes.filter(pl.col("feature").is_in(others[0]))["effect"]
    )
    assert np.bincount(quartile, minlength=4).min() >= 12


def test_freezing_keeps_the_largest_with_their_sign() -> None:
    exact = pl.DataFrame({"feature": [1, 1, 2, 2, 3, 4], "effect": [0.5, 0.7, -2.0, -1.0, 0.1, 9.0]})
    frozen = freeze(exact, [1, 2, 3], 2)
    assert frozen.select("feature", "sign").rows() == [(2, -1), (1, 1)]
    assert frozen["fit_effect"].to_list() == pytest.approx([-1.5, 0.6])


def test_what_is_reported_and_what_is_not() -> None:
    rng = np.random.default_rng(0)

    def around(mean: float, n: int = 40, spread: float = 0.1) -> np.ndarray:
        return mean + spread * rng.normal(size=n)

    effects = {
        0: around(0.5), 1: around(-0.3), 2: around(0.5), 3: around(0.03, spread=0.005), 4: around(0.5),
        5: around(0.0, spread=1.0), 7: around(0.9, 3),
    }  # fmt: skip
    signs = {0: 1, 1: -1, 2: -1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}
    list_ = frozen(signs, {4: ELIGIBLE_PROMPTS - 1})
    table = confirm({"s": list_}, {"s": measured(effects)}, 1.0, 0)["s"]
    rows = {r["feature"]: r for r in table.iter_rows(named=True)}
    assert {f for f, r in rows.items() if r["reported"]} == {0, 1}
    assert rows[2]["q"] > 0.9  # the sign it was frozen with is the other one
    assert rows[3]["q"] > 0.9  # surely not 0, and surely below the bound
    assert rows[4]["q"] == 1.0  # too few prompts where it fires: it is not tested
    assert not rows[4]["eligible"]
    assert rows[5]["q"] > 0.05
    assert (rows[6]["n"], rows[6]["q"]) == (0, 1.0)  # never measured
    assert rows[7]["q"] > 0.05  # three prompts prove nothing
    assert table["feature"].to_list()[:2] == [0, 1]  # reported first, by |mean effect|
    assert table["rank"].to_list() == list(range(1, 9))
    for f, values in effects.items():
        assert rows[f]["mean_effect"] == pytest.approx(values.mean())
        assert rows[f]["ci_low"] <= values.mean() <= rows[f]["ci_high"]
        assert rows[f]["sign_consistency"] == pytest.approx((np.sign(values) == signs[f]).mean())


def test_the_bound_is_in_sd_of_the_reward_difference() -> None:
    effects = {0: np.full(40, 0.5) + 0.01 * np.random.default_rng(0).normal(size=40)}
    for sd, reported in ((1.0, True), (0.45 / BOUND, True), (0.55 / BOUND, False)):
        assert ranked(frozen({0: 1}), measured(effects), sd)[0]["reported"] == reported


def test_a_prompts_two_sides_are_one_measurement() -> None:
    chosen, rejected = measured({0: np.full(30, 0.4)}), measured({0: np.full(30, 0.1)}, side="rejected")
    row = ranked(frozen({0: 1}), pl.concat([chosen, rejected]))[0]
    assert row["n"] == 30
    assert row["mean_effect"] == pytest.approx(0.25)
    assert row["mean_diff"] == pytest.approx(0.3)  # R chosen - R rejected


def test_a_feature_of_the_rejected_side_alone_has_a_negative_difference() -> None:
    row = ranked(frozen({0: 1}), measured({0: np.full(30, 0.4)}, side="rejected"))[0]
    assert row["mean_diff"] == pytest.approx(-0.4)


def test_driving_reward_and_driving_preference_are_two_questions() -> None:
    """0 fires alike on both sides, 1 on the chosen side alone, 2 there too and was frozen with the other sign."""
    rng = np.random.default_rng(0)
    effects = {f: 0.5 + 0.05 * rng.normal(size=40) for f in range(3)}
    both = [measured(effects), measured({0: effects[0] + 0.02 * rng.normal(size=40)}, side="rejected")]
    list_ = frozen(dict.fromkeys(range(3), 1)).with_columns(pl.Series("sign_diff", [1, 1, -1]))
    rows = ranked(list_, pl.concat(both))
    assert [rows[f]["reported"] for f in range(3)] == [True, True, True]
    assert [rows[f]["prefers"] for f in range(3)] == [False, True, False]
    assert rows[1]["diff_low"] < rows[1]["mean_diff"] < rows[1]["diff_high"]


def test_pairs_where_a_feature_is_silent_count_as_0_in_its_mean_difference() -> None:
    """60 prompts of two pairs each; it fires in one pair of every second prompt, on the chosen side, with effect .4."""
    rows = [(f"{p}-0", f"p{p}", "chosen", 0, 0.4, 0.1 * (p % 5), p % 3) for p in range(0, 60, 2)]
    columns = ["pair", "prompt", "side", "feature", "effect", "delta", "length_difference"]
    exact = pl.DataFrame(rows, schema=columns, orient="row")
    counts = firing_counts(exact, pairs=120)
    assert counts.rows() == [(0, 30, 0.25)]
    list_ = frozen({0: 1}).drop("prompts", "fire_pairs").join(counts, on="feature")
    row = ranked(list_, exact)[0]
    differences = [0.4 if (p % 2, i) == (0, 0) else 0.0 for p in range(60) for i in range(2)]
    assert row["mean_diff"] == pytest.approx(np.mean(differences))
    assert row["mean_effect"] == pytest.approx(0.4)


def test_the_sign_of_a_preference_is_that_of_chosen_minus_rejected() -> None:
    rows = [("a", "chosen", 0, 1.0), ("a", "rejected", 0, 3.0), ("b", "chosen", 0, 1.5), ("b", "rejected", 1, -2.0)]
    found = preference_signs(pl.DataFrame(rows, schema=["pair", "side", "feature", "effect"], orient="row"))
    assert found.sort("feature").rows() == [(0, -1), (1, 1)]


def test_q_runs_over_the_lists_of_all_sites() -> None:
    rng = np.random.default_rng(0)
    effects = {0: 0.05 + 0.3 * rng.normal(size=30) + 0.12}
    noise = {f: 0.3 * rng.normal(size=30) for f in range(60)}
    alone = confirm({"a": frozen({0: 1})}, {"a": measured(effects)}, 1.0, 0)
    lists = {"a": frozen({0: 1}), "b": frozen(dict.fromkeys(range(60), 1))}
    both = confirm(lists, {"a": measured(effects), "b": measured(noise)}, 1.0, 0)
    assert set(both) == {"a", "b"}
    assert both["b"].height == 60
    assert both["a"]["q"][0] > 2 * alone["a"]["q"][0]
    assert both["a"]["q_diff"][0] > 2 * alone["a"]["q_diff"][0]


def test_noise_is_seldom_reported() -> None:
    """Thirty features of pure noise, sign frozen on other noise: at most 5 in 100 such runs report anything."""
    runs = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        effects = {f: rng.normal(size=25) * rng.exponential() for f in range(30)}
        signs = {f: int(rng.choice([-1, 1])) for f in range(30)}
        table = confirm({"s": frozen(signs)}, {"s": measured(effects)}, 1.0, seed)["s"]
        runs.append(table["reported"].any() or table["prefers"].any())
    assert sum(runs) <= 2


def test_a_difference_that_length_explains_is_flagged_and_another_is_not() -> None:
    rng = np.random.default_rng(0)
    length = rng.integers(5, 60, size=40)
    by_length, steady = 0.01 * length, 0.3 + 0.01 * rng.normal(size=40)
    rows = ranked(frozen({0: 1, 1: 1}), measured({0: by_length, 1: steady}, length))
    assert rows[0]["length_bound"]
    assert not rows[1]["length_bound"]
    assert rows[0]["length_corr"] == pytest.approx(1.0)
    assert abs(rows[1]["length_corr"]) < 0.4


def test_the_length_correlation_is_what_is_left_when_the_reward_difference_is_known() -> None:
    """Feature 0 follows Δr, and Δr follows length: of itself it has nothing to do with length. Feature 1 has."""
    rng = np.random.default_rng(1)
    length = rng.integers(-40, 40, size=200)
    delta = length / 20 + rng.normal(size=200)
    effects = {0: 0.3 * delta + 0.2 * rng.normal(size=200), 1: 0.3 * delta + 0.02 * length}
    rows = ranked(frozen({0: 1, 1: 1}), measured(effects, length, deltas=delta))
    assert abs(rows[0]["length_corr"]) < 0.15 < 0.5 < np.corrcoef(effects[0], length)[0, 1]
    assert rows[1]["length_corr"] == pytest.approx(1.0)


def test_nothing_frozen_gives_an_empty_ranking() -> None:
    table = confirm({"s": frozen({})}, {"s": measured({0: np.ones(3)})}, 1.0, 0)["s"]
    assert table.height == 0
    assert "mean_effect" in table.columns


@pytest.mark.parametrize(("prompts", "tests", "hits"), [(24, 1, 1), (24, 40, 1), (120, 200, 1), (40, 60, 20)])
def test_an_effect_as_large_as_the_power_says_is_reported_four_times_in_five(prompts: int, tests: int, hits: int) -> None:
    """The smallest p that passes is .05 hits / tests, ``hits`` counting the feature itself: the others are left out."""
    spread, rng = 0.4, np.random.default_rng(0)
    least = power(spread, prompts, 1.0, tests, hits)
    seen = {}
    for size in (least, BOUND + (least - BOUND) / 2):
        drawn = size + spread * rng.normal(size=(150, prompts))
        seen[size] = np.mean([studentised_p(values - BOUND) <= 0.05 * hits / tests for values in drawn])
    large, half = seen.values()
    assert 0.7 < large < 0.9
    assert half < 0.45


def test_with_more_prompts_smaller_effects_become_visible_and_with_too_few_none() -> None:
    assert power(1.0, 400, 2.0, 100) < power(1.0, 100, 2.0, 100) < power(1.0, 24, 2.0, 100)
    assert power(1.0, 100, 2.0, 200) > power(1.0, 100, 2.0, 200, hits=50)
    assert power(1.0, FEW - 1, 2.0, 200) == float("inf")


def test_the_power_statement_names_prompts_and_effect() -> None:
    rng = np.random.default_rng(0)
    exact = measured({f: 0.5 * rng.normal(size=120) for f in range(8)})
    table = confirm({"s": frozen(dict.fromkeys(range(8), 1))}, {"s": exact}, 2.0, 0)["s"]
    said = re.search(
        r"With 120 confirm prompts a feature, mean effect below about (\S+) reward", power_statement(table, 2.0)
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(power(0.5, 120, 2.0, 8), rel=0.1)
    few = confirm({"s": frozen({0: 1}, {0: 19})}, {"s": exact}, 2.0, 0)["s"]
    assert "No feature fires on 20 confirm prompts" in power_statement(few, 2.0)


def test_one_table_of_effects_is_frozen_on_one_half_and_confirmed_on_the_other() -> None:
    """``rmscope.rank``: feature 0 raises reward on both sides, 1 on the chosen one alone, 2 not at all."""
    rng = np.random.default_rng(0)
    pairs = [Pair(f"pair{i}", [{"role": "user", "content": f"Question {i}?"}], "Yes, it is.", "No.") for i in range(240)]
    rows = [
        (p.id, side, f, float(size + 0.02 * rng.normal()))
        for p in pairs
        for side in ("chosen", "rejected")
        for f, size in ((0, 0.5), (1, 0.6), (2, 0.0))
        if f != 1 or side == "chosen"
    ]
    effects = pl.DataFrame(rows, schema=["pair", "side", "feature", "effect"], orient="row")
    deltas = torch.randn(240, generator=torch.Generator().manual_seed(0))
    table = rmscope.rank(effects, pairs, Scores(deltas, torch.zeros(240))).sort("feature")
    assert table["reported"].to_list() == [True, True, False]
    assert table["prefers"].to_list() == [False, True, False]
    assert table["fire_pairs"].to_list() == [1.0, 1.0, 1.0]
    assert table["n"].to_list() == [sum(split_of(p) == "confirm" for p in pairs)] * 3
