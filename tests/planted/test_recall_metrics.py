"""The figures of an audit, on tables made by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from scipy import stats

from rmscope.planted.results import (
    CueResult,
    GroupMatch,
    NullMatch,
    false_discoveries,
    lowest_dose,
    mean_mediated_share,
    recall,
    recall_metrics,
    reported_nulls,
    sign_accuracy,
)
from rmscope.statistics import Figure, share


def cue(**changes: Any) -> CueResult:
    given = {"name": "a", "kind": "phrase", "sign": 1, "ate": Figure(1.0, 0.5, 1.5, 8), "words_alone": None, "learned": True,
             "null": False, "dose": 0.9, "rate": 0.1, "ate_sd": 1.0}  # fmt: skip
    return CueResult(**(given | changes))


def hit(rank: int, value: float = 0.5, **changes: Any) -> CueResult:
    return cue(found=True, rank=rank, mediated=Figure(value, value, value, 8), **changes)


def of_null(*features: int) -> list[NullMatch]:
    return [NullMatch(site="a", feature=j, f1=1.0, moved=0.1) for j in features]


def count(figure: Figure) -> tuple[int, int]:
    """(hits, n) of a share."""
    assert figure.value is not None
    assert figure.n is not None
    return round(figure.value * figure.n), figure.n


ROWS = [
    hit(1, 0.9),
    hit(20, 0.7, kind="repeat_sentence"),
    hit(21, 0.5),
    cue(why="wrong sign"),
    cue(why="no feature", rank=3),  # a rank is told of a group that is no hit, too
    cue(learned=False, why="not learned"),
    hit(2, learned=False),
    cue(learned=False, null=True, matched_by=of_null(7, 8)),
    cue(learned=False, null=True, matched_by=[NullMatch(site="a", feature=9, concept=True, f1=1.0, moved=0.1)]),
    cue(learned=False, null=True),
    cue(learned=False, matched_by=of_null(9)),  # a null that is not clean: told, not counted
]


def test_recall_counts_hits_among_learned_cues_whose_features_all_rank_within_k() -> None:
    assert [count(recall(ROWS, k)) for k in (20, 50, 1)] == [(2, 5), (3, 5), (1, 5)]
    assert recall(ROWS, 20).value == pytest.approx(0.4)


def test_sign_accuracy_counts_cues_that_reported_features_match_in_either_sign() -> None:
    assert count(sign_accuracy(ROWS)) == (3, 4)


def test_nulls_are_those_that_the_pm_left_clean() -> None:
    assert count(reported_nulls(ROWS)) == (2, 3)


def test_a_false_discovery_matches_a_null_or_fails_and_is_counted_once() -> None:
    tables = {
        "a": pl.DataFrame({"feature": [7, 8, 9, 10], "failed": [True, False, False, None]}),
        "b": pl.DataFrame({"feature": [7, 9], "failed": [False, True]}),
    }
    found = false_discoveries(ROWS, tables)  # a/7 (both), a/8 (null), b/9 (failed); concept 9 is no feature
    assert (*count(found), found.unjudged) == (3, 6, 1)


def test_the_mediated_share_is_that_of_lexical_hits_with_all_beside_it() -> None:
    found = mean_mediated_share(ROWS)
    assert found.value == pytest.approx((0.9 + 0.5) / 2)
    assert found.all.value == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert found.learned.value == pytest.approx((0.9 + 0.5 + 0 + 0) / 4)  # two lexical cues were missed
    tried = [cue(mediated=Figure(v), learned=learned) for v, learned in ((0.2, True), (-0.3, True), (0.9, False))]
    assert mean_mediated_share([hit(1, 0.9), *tried]).learned.value == pytest.approx((0.9 + 0.2 + 0) / 3)
    assert mean_mediated_share([cue()]).value is None
    group = GroupMatch(site="a", features=[1, 2], f1=1.0, mediated=Figure(0.8), matched=0.0)
    split = mean_mediated_share([hit(1, 0.3, group=group)])  # a single hit that a group around it exceeds
    assert (split.value, split.best.value) == pytest.approx((0.8, 0.3))


def test_shares_carry_their_exact_interval() -> None:
    found = share(8, 8)
    assert found.low == pytest.approx(0.025 ** (1 / 8))  # the p at which 8 of 8 is as rare as 2.5 %
    assert found.high == 1.0
    expected = stats.beta.ppf([0.025, 0.975], [3, 4], [8, 7])
    assert [share(3, 10).low, share(3, 10).high] == pytest.approx(expected)
    assert share(0, 0).value is None


def test_all_figures_together_are_each_by_itself() -> None:
    tables = {"a": pl.DataFrame({"feature": [7, 8], "failed": [False, False]})}
    metrics = recall_metrics(ROWS, tables)
    assert (metrics.recall_at_20, metrics.recall_at_50) == (recall(ROWS, 20), recall(ROWS, 50))
    assert metrics.sign_accuracy == sign_accuracy(ROWS)
    assert metrics.null_reported == reported_nulls(ROWS)
    assert metrics.false_discoveries == false_discoveries(ROWS, tables)
    assert metrics.mediated_share == mean_mediated_share(ROWS)
    assert metrics.lowest_dose == lowest_dose(ROWS)


def test_cues_that_text_alone_names_are_counted_among_the_learned() -> None:
    rows = [row.model_copy(update={"text": "links"}) for row in (hit(1), cue(), hit(2, learned=False))] + [hit(3)]
    figure = recall_metrics(rows, {}).named_by_text
    assert (figure.value, figure.n) == (pytest.approx(2 / 3), 3)


def test_the_lowest_dose_is_that_of_a_learned_cue_that_was_hit() -> None:
    rows = [hit(1, dose=0.8), hit(2, dose=0.7, learned=False), cue(dose=0.6), hit(3, dose=0.9)]
    assert lowest_dose(rows) == 0.8
    assert lowest_dose([cue()]) is None
