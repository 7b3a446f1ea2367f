"""The mediated share finds a known truth, and mediators are chosen for what they add."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rmscope.studies.jailbreak.analyse import measure_lists
from rmscope.studies.jailbreak.mediation import Mediators, grow, mediated_gain
from rmscope.studies.jailbreak.search import FEATURES, FLIP_SUFFIX, WITHOUT_EFFECT
from rmscope.studies.jailbreak.settings import JailbreakConfig
from tests.planted.test_matching import SITE
from tests.studies.jailbreak.small import cue_case

CONFIG = JailbreakConfig(budget=8)


def test_the_share_of_a_feature_that_is_the_phrase_is_one() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    assert phrase_lists.named is not None
    assert phrase_lists.named.features == [0]
    row = mediated_gain(measure_lists(inputs, phrase_lists, some, 0, CONFIG), FEATURES, WITHOUT_EFFECT)
    assert row.u.low is not None
    assert row.u.low > 0
    assert row.share is not None
    assert row.share.value == pytest.approx(1.0, abs=1e-3)


def test_a_mediator_is_chosen_for_what_it_adds_to_the_others() -> None:
    """Feature 1 alone mediates more than 2, but does the same work as 0; 3 undoes."""
    known = {(0,): 0.4, (1,): 0.35, (2,): 0.1, (3,): -0.2, (0, 1): 0.41, (0, 2): 0.6, (0, 3): 0.1, (0, 1, 2): 0.602}
    assert grow(lambda groups: [known.get(tuple(sorted(g)), 0.0) for g in groups], [3, 1, 2, 0]) == ([0, 2], 0.6)


def test_features_that_carry_nothing_are_not_chosen_and_ablating_none_gives_no_share() -> None:
    inputs, some, phrase_lists = cue_case(0.0)
    assert phrase_lists.named is None
    empty = phrase_lists.model_copy(update={"named": Mediators(SITE, [], [[1]], 0.0)})
    table = measure_lists(inputs, empty, some, 0, CONFIG)
    row = mediated_gain(table, FEATURES, WITHOUT_EFFECT)
    assert row.share is not None
    assert row.share.value == pytest.approx(0.0, abs=1e-5)
    assert row.clear is False
    for reward, without in table.select("reward", "without").rows():
        assert without == pytest.approx(reward, abs=1e-6)


def test_a_share_is_undefined_where_the_gain_may_be_nothing() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    table = measure_lists(inputs, phrase_lists, some, 0, CONFIG)
    row = mediated_gain(table, FEATURES, FEATURES + FLIP_SUFFIX)  # the same texts in both arms
    assert row.u.value == pytest.approx(0.0, abs=1e-9)
    assert (row.share, row.matched, row.clear) == (None, None, None)


def test_without_matched_sets_there_is_a_share_and_no_comparison() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    assert phrase_lists.named is not None
    alone = phrase_lists.model_copy(update={"named": replace(phrase_lists.named, matched=[])})
    row = mediated_gain(measure_lists(inputs, alone, some, 0, CONFIG), FEATURES, WITHOUT_EFFECT)
    assert row.share is not None
    assert (row.matched, row.clear) == (None, None)
