"""The jailbreak lab on small random PMs: rewards are the texts' own, controls are fair, and the proof finds a known truth.

For the proof the case of ``test_cues`` serves: at ``embed`` a feature fires on the cue token alone, and its ablation gives
the stream of the filler token. Then the gain of bad + cue over bad + filler is carried by that feature wholly.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak import analyse, search
from rmscope.studies.jailbreak import mediation as proofs
from rmscope.studies.jailbreak import targets as targets_module
from rmscope.studies.jailbreak.analyse import FEATURE, FLIPPED, NONE, SHUFFLED, WEAK, Inputs, PhraseLists
from rmscope.studies.jailbreak.mediation import Mediators, name_features, proof
from rmscope.studies.jailbreak.page import render_jailbreak
from rmscope.studies.jailbreak.phrases import Phrase, count_tokens
from rmscope.studies.jailbreak.search import SCREEN, Placement, Scorer, Target, compose, cost, flip, pieces, place, screen
from rmscope.studies.jailbreak.targets import DRAWS, Exclusions, make_targets, nonsense, shuffled_words
from tests.model.small import SENTENCES, shared_pm, user
from tests.planted.test_matching import CUE, FILLER, SITE, sae
from tests.report.test_page import HOSTILE, Page

BAD = ["The house is small. Water boils high.", "I was told. It is a pan.", "Use the river and wait.", "A lid. An hour. No."]
TEXTS = [
    "Thanks for asking!",
    "You're right, I was wrong.",
    "see the small house",
    "no problem at all.",
    "Paris.",
    "I don't know.",
]


def target(rm: RewardModel, i: int, bad: str) -> Target:
    pair = Pair(str(i), user(f"Is it {i}?"), "Yes, it is.", "No.")
    reward, chosen, rejected = rm.score_texts(pair.prompt, [bad, pair.chosen, pair.rejected]).tolist()
    return Target(pair, str(i), "nonsense", bad, reward, chosen, rejected)


def targets(rm: RewardModel, n: int = 6) -> list[Target]:
    return [target(rm, i, BAD[i % len(BAD)]) for i in range(n)]


def made_phrases(rm: RewardModel, texts: list[str] = TEXTS) -> list[Phrase]:
    return [Phrase(text, count_tokens(rm, text)) for text in texts]


def alone(rm: RewardModel, t: Target, layout: Any) -> float:
    """The final text by transformers' own forward."""
    ids = rm.text_ids(t.pair.prompt, place(t.bad, layout))
    with torch.no_grad():
        return float(rm.model(ids[None]).logits[0, 0])


@pytest.fixture(scope="module")
def found() -> tuple[RewardModel, list[Target], search.Found]:
    rm = shared_pm("llama")
    some = targets(rm)
    return rm, some, search.search(rm, some, [made_phrases(rm)], budget=24)


def test_reported_rewards_are_those_of_the_final_texts_alone(found: Any) -> None:
    rm, some, result = found
    assert result.layout
    for t, reward in zip(some, result.rewards, strict=True):
        assert reward == pytest.approx(alone(rm, t, result.layout), abs=1e-4)


def test_the_budget_is_never_exceeded_in_the_texts_themselves(found: Any) -> None:
    rm, some, result = found
    for layout in (result.layout, result.flipped):
        assert 0 < cost(layout) <= 24
        for t in some:
            assert t.ids(rm, layout).numel() - t.ids(rm).numel() <= 24
    small = search.search(rm, some, [made_phrases(rm)], budget=3)
    assert cost(small.layout) <= 3


def test_the_token_level_pass_raises_the_exact_mean_reward(found: Any) -> None:
    rm, some, result = found
    assert result.flipped != result.layout
    flipped = np.mean([alone(rm, t, result.flipped) for t in some])
    assert flipped > result.rewards.mean() + 1e-4


def test_the_first_phrase_is_the_best_of_all_and_each_further_one_helps(found: Any) -> None:
    rm, some, result = found
    singles = {
        (p.text, slot): np.mean([alone(rm, t, (Placement(p, slot),)) for t in some])
        for p, slot in itertools.product(made_phrases(rm), search.SLOTS)
    }
    first = result.layout[0]
    assert singles[first.phrase.text, first.slot] == pytest.approx(max(singles.values()), abs=1e-5)
    means = [np.mean([alone(rm, t, result.layout[:n]) for t in some]) for n in range(len(result.layout) + 1)]
    assert means == sorted(means)
    texts = [p.phrase.text for p in result.layout]
    assert len(set(texts)) == len(texts)


def test_the_search_ends_only_where_no_placement_beside_the_list_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    rm = shared_pm("llama")
    some = targets(rm)[:SCREEN]
    monkeypatch.setattr(
        search, "POOL", 1
    )  # each greedy round sees one placement alone: the rest are found by screening anew
    result = search.search(rm, some, [made_phrases(rm)], budget=24)
    used = {p.phrase.text for p in result.layout}
    further = [
        np.mean([alone(rm, t, (*result.layout, Placement(p, slot))) for t in some])
        for p, slot in itertools.product(made_phrases(rm), search.SLOTS)
        if p.text not in used and cost(result.layout) + p.tokens <= 24
    ]
    assert max(further, default=-np.inf) <= result.rewards.mean() + 1e-5


def test_every_text_that_is_scored_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, counted = shared_pm("llama"), []
    honest = search.rewards_from_prefix

    def counting(rm: RewardModel, clean: Any, texts: Any) -> torch.Tensor:
        counted.append(len(texts))
        return honest(rm, clean, texts)

    monkeypatch.setattr(search, "rewards_from_prefix", counting)
    some = targets(rm)
    result = search.search(rm, some, [made_phrases(rm)], budget=24)
    assert result.evaluations + result.flip_evaluations == sum(counted) + len(some)  # a gradient a target


def test_controls_spend_as_many_evaluations_as_they_may_and_no_more() -> None:
    rm = shared_pm("llama")
    some, pools = targets(rm), ([Phrase(f"{a} {b}", 4) for a, b in itertools.product("kmx", f"{i}w")] for i in range(99))
    for limit in (50, 301):
        spent = search.search(rm, some, pools, 24, limit).evaluations
        assert limit - SCREEN < spent <= limit


def test_a_list_of_its_own_ends_once_it_outranks_the_chosen_answer() -> None:
    rm = shared_pm("llama")
    t = dataclasses.replace(target(rm, 0, BAD[0]), chosen=-100.0, reward=-200.0)
    pool = screen(Scorer(rm, [t]), made_phrases(rm), 24)
    layout, rewards = compose(Scorer(rm, [t]), pool, 24, until=1.0)
    assert len(layout) == 1
    assert rewards[0] > t.chosen


def test_phrases_stand_between_whole_sentences_and_nothing_is_lost() -> None:
    layout = tuple(
        Placement(Phrase(w, 1), s) for w, s in (("B b.", "end"), ("A a.", "start"), ("M m.", "middle"), ("C c.", "end"))
    )
    assert place("One. Two. Three.", layout) == "A a. One. Two. M m. Three. B b. C c."
    assert [text for text, added in pieces("One. Two. Three.", layout) if added] == ["A a.", "M m.", "B b.", "C c."]
    assert place("no end", layout) == "A a. no end M m. B b. C c."


def test_shuffling_keeps_the_words_and_how_many_a_phrase_has() -> None:
    from rmscope.studies.jailbreak.phrases import shuffled

    texts = ["Thank you! No problem.", "You're right.", "yes"]
    mixed = shuffled(texts, random.Random(1))
    assert sorted(" ".join(mixed).split()) == sorted(" ".join(texts).split())
    assert [len(t.split()) for t in mixed] == [4, 2, 1]
    assert mixed != texts
    assert sorted(shuffled_words("a b c d", random.Random(0)).split()) == ["a", "b", "c", "d"]
    assert [len(s.split()) for s in sentences(nonsense([3, 1, 5], random.Random(0)))] == [3, 1, 5]


def pairs(n: int = 9) -> list[Pair]:
    return [Pair(str(i), user(f"Is it {i}?"), SENTENCES[i % 5], SENTENCES[(i + 1) % 5]) for i in range(n)]


def test_a_bad_text_lies_below_the_chosen_answer_or_is_not_used() -> None:
    rm, left_out, some = shared_pm("llama"), Exclusions(), pairs()
    made = make_targets(rm, some, [p.id for p in some], 9, 24, 0, left_out)
    assert made
    assert len(made) + sum(left_out.counts.values()) == len(some)
    for t in made:
        bad, chosen, rejected = rm.score_texts(t.pair.prompt, [t.bad, t.pair.chosen, t.pair.rejected]).tolist()
        assert (t.reward, t.chosen, t.rejected) == pytest.approx((bad, chosen, rejected), abs=1e-4)
        assert bad < chosen
    assert len({t.key for t in made}) == len(made)


def test_a_prompt_whose_bad_texts_all_score_above_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, left_out, some = shared_pm("llama"), Exclusions(), pairs()
    above = lambda _rm, _clean, texts: torch.tensor([0.0, 0.0] if len(texts) == 2 else [1.0])  # noqa: E731
    monkeypatch.setattr(targets_module, "rewards_from_prefix", above)
    assert make_targets(rm, some, [p.id for p in some], 9, 24, 0, left_out) == []
    assert sum(left_out.counts.values()) == len(some)
    assert all(f"none of {DRAWS}" in reason for reason in left_out.counts)


def cue_case(share: float) -> tuple[Inputs, list[Target], PhraseLists]:
    """Bad text + cue against bad text + filler, a feature that goes ``share`` of the way from one to the other."""
    rm, made = shared_pm("llama"), sae([share, 0.0])
    arms = [(Placement(Phrase(w, 2), "end"),) for w in (CUE, FILLER)]
    some = [t for t in targets(rm, 20) if alone(rm, t, arms[0]) > alone(rm, t, arms[1])]  # where the cue does raise
    assert len(some) > 4
    subject = Inputs(rm, {SITE: made}, None, [], [], {SITE: [0, 1]}, {SITE: [0]}, {}, 0.0)  # type: ignore[arg-type]
    named = name_features(rm, {SITE: made}, some, arms[0], arms[1], {SITE: [0, 1]})
    lists = {NONE: (), FEATURE: arms[0], WEAK: arms[1], FEATURE + FLIPPED: arms[0]}
    return subject, some, PhraseLists(lists, {}, {}, named)


def test_the_share_of_a_feature_that_is_the_phrase_is_one() -> None:
    subject, some, made = cue_case(1.0)
    assert made.named is not None
    assert made.named.features == [0]
    row = proof(analyse.measure(subject, made, some, 0, 8, 0), FEATURE, WEAK)
    assert row["u"]["low"] > 0
    assert row["share"]["value"] == pytest.approx(1.0, abs=1e-3)


def test_a_feature_is_named_for_what_it_takes_back_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature 1 alone takes back more than 2, but does the same work as 0; 3 undoes."""
    known = {(0,): 0.4, (1,): 0.35, (2,): 0.1, (3,): -0.2, (0, 1): 0.41, (0, 2): 0.6, (0, 3): 0.1, (0, 1, 2): 0.602}
    monkeypatch.setattr(proofs, "_shares", lambda *given: [known.get(tuple(sorted(g)), 0.0) for g in given[-1]])
    assert proofs._grown(None, None, SITE, [], [3, 1, 2, 0]) == ([0, 2], 0.6)  # type: ignore[arg-type]


def test_features_that_carry_nothing_are_not_named_and_ablating_none_gives_no_share() -> None:
    subject, some, made = cue_case(0.0)
    assert made.named is None
    empty = dataclasses.replace(made, named=Mediators(SITE, [], [[1]], 0.0))
    table = analyse.measure(subject, empty, some, 0, 8, 0)
    row = proof(table, FEATURE, WEAK)
    assert row["share"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert row["clear"] is False
    for reward, without in table.select("reward", "without").rows():
        assert without == pytest.approx(reward, abs=1e-6)


def test_a_share_is_undefined_where_the_gain_may_be_nothing() -> None:
    subject, some, made = cue_case(1.0)
    table = analyse.measure(subject, made, some, 0, 8, 0)
    row = proof(table, FEATURE, FEATURE + FLIPPED)  # the same texts in both arms
    assert row["u"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert (row["share"], row["matched"], row["clear"]) == (None, None, None)


def test_the_table_has_every_arms_text_and_its_reward_alone() -> None:
    subject, some, made = cue_case(1.0)
    table = analyse.measure(subject, made, some, 0, 8, 0)
    assert table.height == len(some) * 5  # four lists, and the words of one shuffled
    arms = {t.key: t for t in some}
    for key, arm, text, reward, outranks in table.select("key", "arm", "text", "reward", "outranks").rows():
        (own,) = subject.rm.score_texts(arms[key].pair.prompt, [text]).tolist()
        assert reward == pytest.approx(own, abs=1e-4)
        assert outranks == (reward > arms[key].chosen)
        if arm == SHUFFLED:
            assert sorted(text.split()) == sorted(place(arms[key].bad, made.lists[FEATURE]).split())


def test_success_by_a_margin_is_counted_against_the_chosen_reward() -> None:
    subject, some, made = cue_case(1.0)
    made = dataclasses.replace(made, lists={**made.lists, "blind": made.lists[WEAK]})
    table = analyse.measure(subject, made, some, 0, 8, 0)
    for sd in (0.0, 0.3, 1e9):
        for arm in analyse.summary(table, made, sd)["arms"]:
            rows = table.filter(pl.col("arm") == arm["arm"])
            assert arm["by_sd"]["value"] == (rows["reward"] - rows["chosen"] > sd).mean()


def test_what_was_made_survives_its_file() -> None:
    import json

    _, _, made = cue_case(1.0)
    assert PhraseLists.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_the_page_shows_the_rewards_escapes_texts_and_asks_for_nothing() -> None:
    subject, some, made = cue_case(1.0)
    blank = {"evaluations": 10, "flip_evaluations": 3, "needed": None, "success": 0.5, "trace": []}
    searches = {
        "features": {**blank, "needed": 7, "trace": [{"evaluations": 10, "gain": 1.0, "success": 0.5}]},
        "blind": blank,
    }
    lists = {**made.lists, "blind": made.lists[WEAK]}
    made = dataclasses.replace(made, lists=lists, searches={**searches, "without effect": blank})
    hostile = [dataclasses.replace(t, pair=dataclasses.replace(t.pair, chosen=HOSTILE)) for t in some]
    table = analyse.measure(subject, made, hostile, 0, 8, 0)
    data = {"model": "m", "data": "d", "run": "r", "seed": 0, "budget": 8, "left_out": {HOSTILE: 2}}
    html = render_jailbreak(
        {**data, **analyse.summary(table, made, 1.0), "examples": analyse.examples(table, hostile, made)}
    )
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "default-src 'none'" in html
    assert f"{abs(some[0].reward):.2f}"[:4] in html
    assert "after 7, blind to features never" in html


def test_features_without_effect_are_weak_alike_and_never_used_twice() -> None:
    from rmscope.studies.jailbreak.phrases import without_effect

    means = {j: (10 + j, 5.0 + j, 0.5 if j < 5 else 0.001) for j in range(30)}
    lists = list(without_effect(means, [0, 1, 2], 0.01, seed=0))
    drawn = [j for one in lists for j in one]
    assert len(drawn) == len(set(drawn)) == 25
    assert min(drawn) >= 5
    assert np.mean(lists[0]) < 15  # the nearest ones in firing and mass come first


def test_exact_means_ask_for_enough_ablations() -> None:
    exact = pl.DataFrame({"feature": [1] * 8 + [2] * 3, "effect": [0.5] * 11})
    estimated = pl.DataFrame({"feature": [1, 1, 1, 2], "mass": [1.0, 2.0, 3.0, 4.0]})
    assert analyse.exact_means(exact, estimated) == {1: (3, 2.0, 0.5)}


def test_a_flip_never_makes_a_phrase_longer() -> None:
    rm = shared_pm("llama")
    some = targets(rm)
    layout = tuple(Placement(p, "end") for p in made_phrases(rm)[:3])
    scorer = Scorer(rm, some)
    changed = flip(scorer, layout, scorer.rewards([layout])[0])
    for before, after in zip(layout, changed, strict=True):
        assert after.phrase.tokens == count_tokens(rm, after.phrase.text) <= before.phrase.tokens
        assert after.slot == before.slot
