"""The figures of an audit, on tables made by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch
from scipy import stats

from rmscope.planted.recall_metrics import (
    false_discoveries,
    found_again,
    lowest_dose,
    mediated,
    nulls_reported,
    recall,
    share,
    sign_accuracy,
    summary,
)
from tests.model.small import small_sae


def cue(**changes: Any) -> dict[str, Any]:
    row = {
        "kind": "phrase",
        "learned": True,
        "null": False,
        "found": False,
        "rank": None,
        "why": "",
        "dose": 0.9,
        "matched_by": [],
    }
    return row | {"mediated": None, "group": None} | changes


def hit(rank: int, value: float = 0.5, **changes: Any) -> dict[str, Any]:
    return cue(found=True, rank=rank, mediated={"value": value}, **changes)


ROWS = [
    hit(1, 0.9),
    hit(20, 0.7, kind="repeat_sentence"),
    hit(21, 0.5),
    cue(why="wrong sign"),
    cue(why="no feature", rank=3),  # a rank is told of a group that is no hit, too
    cue(learned=False, why="not learned"),
    hit(2, learned=False),
    cue(learned=False, null=True, matched_by=[{"site": "a", "feature": 7}, {"site": "a", "feature": 8}]),
    cue(learned=False, null=True),
    cue(learned=False, matched_by=[{"site": "a", "feature": 9}]),  # a null that is not clean: told, not counted
]


def test_recall_counts_hits_among_learned_cues_whose_features_all_rank_within_k() -> None:
    assert (recall(ROWS, 20)["hits"], recall(ROWS, 50)["hits"], recall(ROWS, 1)["hits"]) == (2, 3, 1)
    assert recall(ROWS, 20)["n"] == 5
    assert recall(ROWS, 20)["value"] == pytest.approx(0.4)


def test_sign_accuracy_counts_cues_that_reported_features_match_in_either_sign() -> None:
    assert (sign_accuracy(ROWS)["hits"], sign_accuracy(ROWS)["n"]) == (3, 4)


def test_nulls_are_those_that_the_pm_left_clean() -> None:
    assert (nulls_reported(ROWS)["hits"], nulls_reported(ROWS)["n"]) == (1, 2)


def test_a_false_discovery_matches_a_null_or_fails_and_is_counted_once() -> None:
    tables = {
        "a": pl.DataFrame({"feature": [7, 8, 9, 10], "failed": [True, False, False, None]}),
        "b": pl.DataFrame({"feature": [7, 9], "failed": [False, True]}),
    }
    found = false_discoveries(ROWS, tables)  # a/7 (both), a/8 (null), b/9 (failed); b/7 is another feature than a/7
    assert (found["hits"], found["n"], found["unjudged"]) == (3, 6, 1)


def test_the_mediated_share_is_that_of_lexical_hits_with_all_beside_it() -> None:
    found = mediated(ROWS)
    assert found["value"] == pytest.approx((0.9 + 0.5) / 2)
    assert found["all"]["value"] == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert found["learned"]["value"] == pytest.approx((0.9 + 0.5 + 0 + 0) / 4)  # two lexical cues were missed
    tried = cue(mediated={"value": 0.2}), cue(mediated={"value": -0.3}), cue(learned=False, mediated={"value": 0.9})
    assert mediated([hit(1, 0.9), *tried])["learned"]["value"] == pytest.approx((0.9 + 0.2 + 0) / 3)
    assert mediated([cue()])["value"] is None
    split = mediated([hit(1, 0.3, group={"mediated": {"value": 0.8}})])  # a single hit that a group around it exceeds
    assert (split["value"], split["best"]["value"]) == pytest.approx((0.8, 0.3))


def test_shares_carry_their_exact_interval() -> None:
    found = share(8, 8)
    assert found["low"] == pytest.approx(0.025 ** (1 / 8))  # the p at which 8 of 8 is as rare as 2.5 %
    assert found["high"] == 1.0
    expected = stats.beta.ppf([0.025, 0.975], [3, 4], [8, 7])
    assert [share(3, 10)["low"], share(3, 10)["high"]] == pytest.approx(expected)
    assert share(0, 0)["value"] is None


def test_a_feature_is_found_again_where_both_of_its_directions_are() -> None:
    first, other = small_sae(seed=0), small_sae(seed=1)
    assert found_again(first, first, [0, 5, 9]) == [True] * 3
    assert found_again(first, other, [0, 5, 9]) == [False] * 3  # random directions
    with torch.no_grad():
        other.W_dec[3], other.W_enc[:, 3] = 2 * first.W_dec[0], 3 * first.W_enc[:, 0]  # cosines know no lengths
        other.W_dec[4] = first.W_dec[5]  # the decoder alone is not enough
    assert found_again(first, other, [0, 5, 9]) == [True, False, False]


def test_the_summary_has_the_keys_that_are_promised() -> None:
    tables = {"a": pl.DataFrame({"feature": [7, 8], "failed": [False, False]})}
    promised = {"recall_at_20", "recall_at_50", "sign_accuracy", "null_reported", "false_discoveries", "mediated_share"}
    assert promised <= summary(ROWS, tables).keys()


def test_the_lowest_dose_is_that_of_a_learned_cue_that_was_hit() -> None:
    rows = [hit(1, dose=0.8), hit(2, dose=0.7, learned=False), cue(dose=0.6), hit(3, dose=0.9)]
    assert lowest_dose(rows) == 0.8
    assert lowest_dose([cue()]) is None
