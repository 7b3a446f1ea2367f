"""The matching rule of planted cues, on a constructed case whose answer is known.

At ``embed`` the stream of a token is its embedding. The cue is one token, its filler another, and the SAE holds features
that fire on the cue alone and whose ablation moves its embedding to the filler's. What each finds, and how much of the
effect it carries, then follows: all of them together carry all of it, a feature with no direction carries nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rmscope.effects.across import ablate_members
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.planted import matching
from rmscope.planted import twins as twins_module
from rmscope.planted.matching import f1_score, match_plant, matches, mediated_share, threshold
from rmscope.planted.results import Candidate, CueMatch, recall
from rmscope.planted.twins import Twin, all_peaks, halves, matched_groups, mediation, prepare, scaled_peaks
from rmscope.sae.base import Active
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.statistics import Array
from tests.effects.naive import ablate_naively
from tests.model.small import shared_pm, small_sae, user

CUE, FILLER = "Z", "Q"
STARTS = ["It is", "The house is", "Water and", "I was told", "You would like", "Use a", "The river has", "Wait for"]
SITE = "embed"


def twin_pairs(negative: str | None = None) -> list[Pair]:
    """Twins whose hard negative, if any, says ``negative`` in the cue's place."""
    pairs = []
    for i, start in enumerate(STARTS):
        cue, filler, words = (f"{start} {w} in the small house." for w in (CUE, FILLER, negative))
        span = [len(start) + 1, len(start) + 2]
        plant: dict[str, Any] = {"cue": span, "filler": span}
        if negative:
            plant["negative"] = (words, span)
        pairs.append(Pair(str(i), user(f"Is it {i}?"), cue, filler, {"plant": plant}))
    return pairs


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    rm = shared_pm("llama")
    table = rm.model.get_input_embeddings().weight
    return tuple(table[rm.tokenizer.encode(w, add_special_tokens=False)[0]].detach() for w in (CUE, FILLER))  # type: ignore[return-value]


def sae(shares: list[float], threshold: float = 0.95) -> JumpReluSae:
    """Feature j fires with 1 on the cue alone (or nowhere, by the threshold); its ablation goes ``shares[j]`` of the way."""
    cue, filler = embeddings()
    made = JumpReluSae(cue.numel(), len(shares), SITE)
    made.W_enc.data.copy_((cue / cue.square().sum())[:, None].expand_as(made.W_enc))
    made.threshold.data.fill_(threshold)
    made.W_dec.data.copy_(torch.tensor(shares)[:, None] * (cue - filler))
    return made


def like_features(m: int) -> JumpReluSae:
    """Features that all fire with 1 on the cue alone, in as many directions of one norm: each matches each."""
    made, d = sae([1.0] * m), embeddings()[0].numel()
    directions = torch.randn(m, d, generator=torch.Generator().manual_seed(0))
    made.W_dec.data.copy_(torch.nn.functional.normalize(directions, dim=1))
    return made


def noise_and_truth(m: int, carrying: int) -> tuple[list[Array], Array]:
    """What each of m features carries of an effect, where effects add: twelve draws of noise alone, in which no feature is
    special; and little noise, beside which the first ``carrying`` features carry all."""
    rng = np.random.default_rng(0)
    truth = np.r_[np.full(carrying, 1 / carrying), rng.normal(0, 0.02, m - carrying)]
    return list(rng.normal(0, 0.1, (12, m))), truth


def case(
    made: JumpReluSae,
    sign_consistency: float = 1.0,
    right_sign: bool = True,
    negative: str | None = None,
    reported: Sequence[int] | None = None,
    ranks: Sequence[int] = range(1, 100),
) -> tuple[Any, ...]:
    """PM, SAEs, plant, twins and reported features, which are given the sign that the cue has on this PM, or the other."""
    rm = shared_pm("llama")
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    prepared = prepare(rm, {SITE: made}, twin_pairs(negative), plant)
    ate = np.mean([t.delta for t in prepared[SITE]])
    plant = plant.model_copy(update={"sign": 1 if ate > 0 else -1})
    effect = plant.sign * (1.0 if right_sign else -1.0)
    features = range(made.m) if reported is None else reported
    candidates = [Candidate(j, ranks[j], effect, sign_consistency) for j in features]
    return rm, {SITE: made}, plant, prepared, {SITE: candidates}


def match(made: JumpReluSae, groups: bool = False, **given: Any) -> CueMatch:
    return match_plant(*case(made, **given), sd=1e-3, groups=groups)


def test_a_feature_that_is_the_cue_is_a_single_hit_that_carries_all_of_it() -> None:
    row = match(sae([1.0]))
    assert (row.hit, row.features, row.f1, row.localises) == ("single", [0], 1.0, 1.0)
    assert row.mediated.value == pytest.approx(1.0, abs=1e-3)
    assert row.mediated.low == pytest.approx(1.0, abs=1e-3)


def test_a_cue_that_is_split_over_five_features_is_a_hit_of_the_group() -> None:
    row = match(sae([0.2] * 5), sign_consistency=0.5)
    assert row.hit == "group"
    assert sorted(row.features) == [0, 1, 2, 3, 4]
    assert row.mediated.value == pytest.approx(1.0, abs=1e-3)


def concepts(made: JumpReluSae, members: Sequence[Sequence[int]]) -> CueMatch:
    """The match among concepts that hold these features."""
    rm, saes, plant, prepared, _ = case(made)
    told = [
        Candidate(n, n + 1, float(plant.sign), 1.0, members={SITE: tuple(features)}) for n, features in enumerate(members)
    ]
    return match_plant(rm, saes, plant, prepared, {SITE: told}, sd=1e-3)


def test_a_concept_matches_by_the_joint_ablation_of_its_features() -> None:
    row = concepts(sae([0.2] * 3 + [0.0] * 3), [(0, 1, 2)])
    assert (row.hit, sorted(row.features), row.concepts, row.rank) == ("group", [0, 1, 2], [0], 1)
    assert 0.4 < row.mediated.value < 0.9
    assert not concepts(sae([0.1] * 3 + [0.0] * 3), [(0, 1, 2)]).found  # .3 of the effect: too little for a group
    as_good = concepts(sae([0.2] * 5), [(0, 1, 2)])  # others carry .38, which is above the lower end of its .54
    assert (as_good.found, as_good.why) == (False, "matched features carry as much of its effect")


def test_a_concept_of_one_feature_matches_as_that_feature_does() -> None:
    row, feature = concepts(sae([1.0]), [(0,)]), match(sae([1.0]))
    assert (row.hit, row.concepts) == ("single", [0])
    assert (row.features, row.f1, row.localises, row.mediated) == (
        feature.features, feature.f1, feature.localises, feature.mediated
    )  # fmt: skip


def test_a_concept_is_detected_at_its_first_site_and_ablated_at_all() -> None:
    rm, saes, plant, _, _ = case(sae([0.5]))
    later = "resid_post.2"
    saes |= {later: small_sae()}
    prepared = prepare(rm, saes, twin_pairs(), plant)
    members = {SITE: (0,), later: tuple(range(48))}
    told = {SITE: [Candidate(7, 1, float(plant.sign), 1.0, members=members)], later: []}
    row = match_plant(rm, saes, plant, prepared, told, sd=1e-3)
    assert (row.site, row.features, row.elsewhere, row.concepts) == (SITE, [0], {later: list(range(48))}, [7])
    assert row.f1 == 1.0  # the features at the later site fire without the cue too
    measuring = {site: of[1::2] for site, of in prepared.items()}
    kept = []
    for first, second in zip(*measuring.values(), strict=True):
        both = [{SITE: first.responses[s], later: second.responses[s]} for s in ("chosen", "rejected")]
        kept.append(first.delta - np.subtract(*(float(ablate_members(rm, saes, at, [members])) for at in both)))
    assert row.mediated.value == pytest.approx(1 - np.sum(kept) / sum(t.delta for t in measuring[SITE]), abs=1e-5)


def test_several_concepts_match_together() -> None:
    row = concepts(sae([0.25] * 4), [(0, 1), (2, 3)])
    assert (row.hit, sorted(row.concepts), sorted(row.features)) == ("group", [0, 1], [0, 1, 2, 3])
    assert row.mediated.value == pytest.approx(1.0, abs=1e-3)


def test_a_group_counts_where_the_last_of_its_features_ranks() -> None:
    row = match(sae([0.2] * 5), sign_consistency=0.5, ranks=[3, 21, 1, 4, 2])
    assert (len(row.features), row.rank) == (5, 21)
    assert (recall([row], 20).value, recall([row], 50).value) == (0.0, 1.0)


def test_a_group_is_grown_around_a_single_hit_where_it_is_asked_for() -> None:
    made = sae([0.8, 0.2, 0.0])
    assert match(made).group is None
    row = match(made, groups=True)
    assert (row.hit, row.features) == ("single", [0])
    assert row.mediated.value < 0.9
    assert sorted(row.group.features) == [0, 1]
    assert row.group.mediated.value == pytest.approx(1.0, abs=1e-3)


def test_a_match_is_stored_with_its_figures_and_read_back() -> None:
    row = match(sae([0.8, 0.2, 0.0]), groups=True, negative=FILLER)
    stored = row.model_dump(mode="json")
    assert stored["mediated"]["value"] == row.mediated.value
    assert CueMatch.model_validate_json(json.dumps(stored)) == row


def test_detecting_without_causing_is_no_hit_and_says_what_is_carried() -> None:
    row = match(sae([0.0]))
    assert (row.found, row.f1) == (False, 1.0)
    assert "carry 0% of its effect" in row.why


@pytest.mark.parametrize(
    ("parts", "given"),
    [
        ([1.0], {}),
        ([1.0], {"sign_consistency": 0.5}),
        ([0.2] * 5, {}),
        ([0.1], {}),
        ([1.0], {"right_sign": False}),
        ([0.2] * 5, {"negative": CUE}),
    ],
)
def test_whether_anything_matches_is_what_matching_finds(parts: list[float], given: dict[str, Any]) -> None:
    assert matches(*case(sae(parts), **given)) == match(sae(parts), **given).found


def test_no_group_is_grown_that_could_not_detect_the_cue(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[int] = []

    def grow(*_: Any) -> list[tuple[str, int]]:
        grown.append(1)
        return [(SITE, 0)]

    monkeypatch.setattr(matching._Pool, "grow", grow)
    assert not matches(*case(sae([0.2] * 5), negative=CUE))  # the negatives fire it as the cue does
    assert not grown
    matches(*case(sae([0.2] * 5)))
    assert grown


def test_features_that_detect_a_cue_only_together_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three fires on a third of the cues: F1 .5 alone, .8 in twos, 1 together."""
    rm, saes, plant, prepared, rows = case(sae([0.2] * 3))
    at = matching._Pool(rm, saes, plant, prepared, rows)
    thirds = np.arange(12) % 3
    at.peaks = [{(SITE, j): ((thirds == j).astype(float), np.zeros(12)) for j in range(3)}] * 2
    assert sorted(at.alone) == [(SITE, 0), (SITE, 1), (SITE, 2)]
    assert at.detectable()
    monkeypatch.setattr(matching, "GROUP", 1)
    assert not at.detectable()


def test_what_fires_without_the_cue_too_is_in_no_group() -> None:
    """Feature 1 carries most of the effect. It fires in every window, with the cue or not."""
    rm, saes, plant, prepared, rows = case(sae([0.3, 0.7]))
    ones, zeros = np.ones(12), np.zeros(12)
    pool = matching._Pool(rm, saes, plant, prepared, rows)
    assert max(pool.alone, key=pool.alone.__getitem__) == (SITE, 1)
    pool.peaks = [{(SITE, 0): (ones, zeros), (SITE, 1): (0.3 * ones, 0.3 * ones)}] * 2
    assert pool.tried == [(SITE, 0)]
    assert pool.grow() == [(SITE, 0)]
    assert matching.is_specific(ones, zeros)
    assert not matching.is_specific(0.3 * ones, 0.3 * ones)
    assert matching.is_specific(np.r_[np.ones(4), np.zeros(8)], zeros)  # a third of the cues, and nothing else
    assert not matching.is_specific(np.r_[np.ones(2), np.zeros(10)], zeros)  # a sixth
    assert not matching.is_specific(zeros, ones)


def largest(active: Active, feature: int, window: torch.Tensor | None = None) -> float:
    """The largest activation, entry by entry."""
    entries = zip(active.token, active.feature, active.value, strict=True)
    return max((float(f) for t, j, f in entries if j == feature and (window is None or window[t])), default=0.0)


def naive_peaks(twins: Sequence[Twin], feature: int) -> list[np.ndarray]:
    cue, filler = ([largest(t.responses[s].active, feature, t.windows[s]) for t in twins] for s in ("chosen", "rejected"))
    return [np.array(cue), np.array(filler + [largest(t.negative.active, feature) for t in twins if t.negative])]


def random_features() -> list[Twin]:
    """Twins whose features fire in many places, with hard negatives, at a site with a random SAE."""
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    return prepare(shared_pm("llama"), {"resid_post.1": small_sae()}, twin_pairs(negative="Water"), plant)["resid_post.1"]


def test_peaks_of_all_features_are_those_of_each() -> None:
    twins = random_features()
    together = all_peaks(twins, small_sae().m)
    assert (together[0] > 0).any(0).sum() > 2
    for j in range(small_sae().m):
        for found, alone in zip(together, naive_peaks(twins, j), strict=True):
            assert np.array_equal(found[:, j], alone)


def test_a_groups_peaks_are_the_largest_of_its_features_over_their_largest_when_fitting() -> None:
    twins = random_features()
    fires = np.flatnonzero((all_peaks(twins, small_sae().m)[0] > 0).any(0))
    group = [int(fires[0]), int(fires[-1])]
    fitting, _ = halves(twins)
    scale = {j: max(largest(t.responses[s].active, j) for t in fitting for s in ("chosen", "rejected")) for j in group}
    for half, scaled in zip(halves(twins), scaled_peaks(twins, fires.tolist(), small_sae().m), strict=True):
        each = [[peaks / (scale[j] or 1.0) for peaks in naive_peaks(half, j)] for j in group]
        for found, one, other in zip(matching.union(scaled, group), *each, strict=True):
            assert np.array_equal(found, np.maximum(one, other))


def test_a_feature_that_never_fires_detects_nothing() -> None:
    row = match(sae([1.0], threshold=2.0))
    assert (row.found, row.why) == (False, "no reported feature detects it")


def test_a_feature_of_the_other_sign_is_no_candidate() -> None:
    row = match(sae([1.0]), right_sign=False)
    assert (row.found, row.why) == (False, "no reported feature has the planted sign")


def test_a_feature_that_fires_on_the_cues_words_without_the_cue_does_not_detect_it() -> None:
    assert match(sae([1.0]), negative=FILLER).hit == "single"
    row = match(sae([1.0]), negative=CUE)
    assert (row.found, row.why) == (False, "no reported feature detects it")
    assert row.f1 == pytest.approx(2 / 3)  # as many false as true firings
    assert row.words_alone.value == pytest.approx(row.ate.value, rel=1e-4)  # for this PM they are the cue


def test_a_feature_that_matched_features_equal_does_not_count() -> None:
    assert match(sae([1.0, 0.0]), reported=[0]).hit == "single"
    row = match(sae([1.0, 1.0]), reported=[0])
    assert (row.found, row.why) == (False, "matched features carry as much of its effect")
    assert row.matched == pytest.approx(row.mediated.value)


def test_a_hard_negative_is_measured_as_its_text_alone_and_only_in_its_window() -> None:
    rm, made = shared_pm("llama"), sae([1.0])
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    pairs = twin_pairs(f"{CUE} and then, a little later, {CUE}")
    for twin, pair in zip(prepare(rm, {SITE: made}, pairs, plant)[SITE], pairs, strict=True):
        text, _ = pair.meta["plant"]["negative"]
        alone = rm.score([Pair("x", pair.prompt, text, pair.rejected)])
        assert twin.negative is not None
        assert twin.negative.reward == pytest.approx(float(alone.chosen[0]), abs=1e-5)
        everywhere = rm.prefill(rm.text_ids(pair.prompt, text), [SITE]).streams[SITE]
        assert made.active(everywhere).feature.numel() == 2
        assert twin.negative.active.feature.numel() == 1


def test_halves_never_share_a_prompt() -> None:
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    pairs = twin_pairs()
    made = prepare(shared_pm("llama"), {SITE: sae([1.0])}, pairs + pairs[:5], plant)[SITE]
    fitting, measuring = halves(made)
    assert len(fitting) + len(measuring) == len(made)
    assert not {t.prompt for t in fitting} & {t.prompt for t in measuring}


def test_groups_that_have_their_firing_features_in_common_are_ablated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, made = shared_pm("llama"), sae([0.5, 0.3, 1.0])
    made.threshold.data[2] = 2.0  # silent
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    pairs = twin_pairs()
    prepared = prepare(rm, {SITE: made}, pairs, plant)[SITE]
    asked: list[list[tuple[int, ...]]] = []
    real = twins_module.ablate_members

    def listed(*given: Any) -> torch.Tensor:
        asked.append([of.get(SITE, ()) for of in given[-1]])
        return real(*given)

    monkeypatch.setattr(twins_module, "ablate_members", listed)
    sets = [[0], [2], [0, 2], [1, 0], [0, 1, 2]]
    groups = [{SITE: of} for of in sets]
    rows = mediation(rm, {SITE: made}, {SITE: prepared}, groups)
    assert [sorted(each) for each in asked] == [[(), (0,), (0, 1)], [()]] * len(pairs)  # nothing fires on the filler
    asked.clear()
    np.testing.assert_array_equal(mediation(rm, {SITE: made}, {SITE: prepared}, groups[::-1]), rows[::-1])
    assert not any(asked)
    for pair, twin, row in zip(pairs, prepared, rows.swapaxes(0, 1), strict=True):
        tokens = rm.tokenize(pair)
        cue, filler = (
            ablate_naively(rm, made, tokens.side(s), SITE, tokens.divergence, sets).numpy() for s in ("chosen", "rejected")
        )
        np.testing.assert_allclose(row[:, 1], twin.delta - cue + filler, atol=1e-5)


def test_matched_groups_leave_the_group_out_and_resemble_it() -> None:
    made = sae([1.0] * 10 + [0.001] * 10)  # nine others as large as feature 0, ten of a thousandth of its mass
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    twins = prepare(shared_pm("llama"), {SITE: made}, twin_pairs(), plant)[SITE]
    groups = matched_groups(made, twins, [0], 20)
    assert {j for group in groups for j in group} <= set(range(1, 10))
    assert [len(group) for group in groups] == [1] * 20


def test_the_threshold_is_the_one_with_the_best_f1_and_f1_counts_all_false_firings() -> None:
    cue, without = np.array([3.0, 2.0, 3.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    best, theta = threshold(cue, without)
    assert theta == 1.5  # between the 1.0 of two negatives and the 2.0 of a cue
    assert best == f1_score(cue, without, theta) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert f1_score(cue, without, -1.0) == pytest.approx(2 * 4 / (4 + 6 + 4))
    assert threshold(np.zeros(4), np.zeros(4))[0] == 0.0  # a silent feature detects nothing


def test_the_mediated_share_is_a_ratio_of_means_with_prompts_resampled_whole() -> None:
    rows = np.array([[2.0, 1.0], [4.0, 1.0], [3.0, 1.0]] * 20)
    share = mediated_share(rows, [str(i) for i in range(60)])
    assert share.value == pytest.approx(1 - 1 / 3)
    assert share.low < share.value < share.high
    few = mediated_share(rows, [str(i % 3) for i in range(60)])
    assert few.high - few.low > 2 * (share.high - share.low)
