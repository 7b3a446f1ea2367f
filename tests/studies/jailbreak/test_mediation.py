"""The mediated share finds a known truth, and mediators are chosen for what they add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rmscope.statistics import Array
from rmscope.studies.jailbreak import mediation
from rmscope.studies.jailbreak.analyse import measure_lists
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.mediation import Mediators, choose_mediators, grow, mediated_gain
from rmscope.studies.jailbreak.search import FEATURES, FLIP_SUFFIX, WITHOUT_EFFECT
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import Placement
from tests.model.small import shared_pm
from tests.planted.test_matching import CUE, FILLER, SITE, like_features, noise_and_truth
from tests.studies.jailbreak.small import cue_case, targets

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


def known_case(monkeypatch: pytest.MonkeyPatch, shares: Array) -> Mediators:
    """G and its matched sets where feature j mediates ``shares[j]`` on every prompt, and shares add; 15 are reported."""

    def additive(_rm: Any, _saes: Any, prepared: Any, groups: Any) -> Array:
        mediated = np.array([shares[group[SITE]].sum() for group in groups])
        rows = np.ones((len(groups), len(prepared[SITE]), 2))
        rows[:, :, 1] -= mediated[:, None]
        return rows

    monkeypatch.setattr(mediation, "mediation", additive)
    rm, reported = shared_pm("llama"), list(range(15))
    inputs = Inputs(rm, {SITE: like_features(len(shares))}, None, [], [], {SITE: reported}, {}, {}, 0.0)  # type: ignore[arg-type]
    cue, filler = ((Placement(w, 2, slot="end"),) for w in (CUE, FILLER))
    named = choose_mediators(inputs, targets(rm, 2), cue, filler)
    assert named is not None
    return named


def test_matched_sets_are_searched_as_g_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise alone the search picks what happens to mediate, so G must not stand out from its matched sets; what carries
    all of the gain must."""
    noise, truth = noise_and_truth(60, 4)
    stands_out = []
    for shares in noise:
        named = known_case(monkeypatch, shares)
        assert len(named.matched) > 8
        assert all(len(group) == len(named.features) and not {*group} & {*range(15)} for group in named.matched)
        stands_out.append(shares[named.features].sum() > max(shares[group].sum() for group in named.matched))
    assert sum(stands_out) <= 3  # 1 in 17 would, if draws were independent
    named = known_case(monkeypatch, truth)
    assert {0, 1, 2, 3} <= {*named.features}
    assert truth[named.features].sum() > 0.9
    assert max(truth[group].sum() for group in named.matched) < 0.4


def test_where_all_features_are_named_there_is_no_matched_set() -> None:
    inputs, _, phrase_lists = cue_case(1.0)
    assert phrase_lists.named is not None
    assert inputs.saes[SITE].m == 2
    assert phrase_lists.named.matched == []  # the other feature has no mass


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
