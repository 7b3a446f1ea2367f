"""Why a learned cue was missed, and which nulls are reported, on constructed cases with known answers (test_matching.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmscope.effects.ledger import baseline
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.planted.diagnosis import Diagnosis, match_null
from rmscope.planted.matching import cue_effect
from rmscope.planted.results import Candidate
from rmscope.planted.twins import prepare
from rmscope.sae.base import Sae
from tests.model.small import shared_pm
from tests.planted.test_matching import CUE, SITE, sae, twin_pairs

SD = 1e-3
"""So small that whatever the random PM makes of the cue counts as learned."""


def candidate(feature: int, effect: float, consistency: float = 1.0) -> Candidate:
    return Candidate(feature, feature + 1, effect, consistency)


def missed(made: Sae, effect: float | None = None, pairs: list[Pair] | None = None, consistency: float = 1.0) -> Diagnosis:
    """A learned cue; feature 0 is reported with an effect of the planted sign times ``effect``, or nothing is."""
    rm, pairs = shared_pm("llama"), pairs or twin_pairs()
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    prepared = prepare(rm, {SITE: made}, pairs, plant)
    ate = np.mean([t.delta for t in prepared[SITE]])
    plant = plant.model_copy(update={"sign": 1 if ate > 0 else -1})
    reported = {SITE: [] if effect is None else [candidate(0, effect * plant.sign, consistency)]}
    x = torch.cat([t.responses["chosen"].x for t in prepared[SITE]])
    start = baseline(made, "mean", made.encode(x).mean(0), x.mean(0))
    return Diagnosis(rm, {SITE: made}, plant, prepared, rm.tokenize_all(pairs), reported, {SITE: start})


def test_a_matching_feature_of_the_other_sign_is_a_wrong_sign() -> None:
    assert missed(sae([1.0]), effect=-1.0).reason() == "wrong sign"


def test_a_matching_feature_whose_sign_changes_is_told_and_not_said_to_be_unreported() -> None:
    case = missed(sae([1.0]), effect=1.0, consistency=0.875)
    assert case.reason() == "sign not constant"
    assert [c.sign_consistency for c in case._detectors(SITE)] == [0.875]
    assert [c.sign_consistency for c in missed(sae([1.0]), effect=-1.0)._detectors(SITE)] == [0.0]
    assert [c.sign_consistency for c in missed(sae([1.0]))._detectors(SITE)] == [1.0]


def test_a_matching_feature_that_no_one_reported_is_told() -> None:
    assert missed(sae([1.0])).reason() == "feature not reported"
    assert missed(sae([0.0, 1.0]), effect=-1.0).reason() == "feature not reported"  # 0 has the other sign and no effect


def test_what_no_feature_holds_is_carried_by_the_error() -> None:
    case = missed(sae([0.0]))
    assert case.error_share(SITE) == pytest.approx(1.0, abs=0.02)
    assert case.reason() == "carried by the error"


def test_an_effect_in_features_that_do_not_detect_the_cue_has_no_feature() -> None:
    case = missed(sae([1.0]), pairs=twin_pairs(negative=CUE))  # the negatives fire it as the cue does
    assert case.error_share(SITE) < 0.5
    assert case.reason() == "no feature"


def test_a_null_is_reported_where_a_feature_detects_it_and_moves_the_reward() -> None:
    rm, plant = shared_pm("llama"), Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    for shares, reported in (([1.0], True), ([0.0], False)):
        made = sae(shares)
        prepared = prepare(rm, {SITE: made}, twin_pairs(), plant)
        ate = float(np.mean([t.delta for t in prepared[SITE]]))
        candidates = {SITE: [candidate(0, ate)]}
        assert bool(match_null(rm, {SITE: made}, plant, prepared, candidates, SD)) is reported
        assert not match_null(rm, {SITE: made}, plant, prepared, candidates, 1e3 * abs(ate))  # below the bound of a report
        assert not match_null(rm, {SITE: made}, plant, prepared, {SITE: [candidate(0, -ate)]}, SD)


def test_a_cue_is_learned_a_clean_null_or_neither() -> None:
    rm, made = shared_pm("llama"), sae([1.0])
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    twins = prepare(rm, {SITE: made}, twin_pairs(), plant)[SITE]
    ate = float(np.mean([t.delta for t in twins]))
    right = plant.model_copy(update={"sign": 1 if ate > 0 else -1})
    wrong = plant.model_copy(update={"sign": -right.sign})
    largest = max(abs(t.delta) for t in twins)
    states = [(p, sd) for p, sd in ((right, SD), (wrong, SD), (right, 11 * largest), (right, 5 * largest))]
    told = [(row.learned, row.null) for row in (cue_effect(p, twins, sd) for p, sd in states)]
    assert told == [(True, False), (False, False), (False, True), (False, False)]


def test_a_null_is_reported_where_a_concept_detects_it_and_moves_the_reward() -> None:
    rm, plant, made = shared_pm("llama"), Plant(name="z", kind="phrase", sign=1, texts=(CUE,)), sae([0.5, 0.5, 0.0])
    prepared = prepare(rm, {SITE: made}, twin_pairs(), plant)
    ate = float(np.mean([t.delta for t in prepared[SITE]]))
    for members, reported in (((0, 1), True), ((2,), False)):
        candidates = {SITE: [Candidate(4, 1, ate, 1.0, members={SITE: members})]}
        found = match_null(rm, {SITE: made}, plant, prepared, candidates, SD)
        assert [(m.feature, m.concept) for m in found] == ([(4, True)] if reported else [])
        assert not reported or found[0].moved == pytest.approx(abs(ate), rel=0.5)
