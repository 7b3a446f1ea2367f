"""The search: rewards are those of the final texts, the budget holds, and controls spend as much as they may."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rmscope.model.reward_model import RewardModel
from rmscope.studies.jailbreak import search as search_module
from rmscope.studies.jailbreak.search import SCREEN, Scorer, SearchResult, compose, flip_tokens, screen, search
from rmscope.studies.jailbreak.targets import SLOTS, Phrase, Placement, Target, cost, count_tokens, pieces, place
from tests.model.small import shared_pm
from tests.studies.jailbreak.small import BAD, placed, reward_alone, some_phrases, target, targets

Case = tuple[RewardModel, list[Target], SearchResult]


@pytest.fixture(scope="module")
def case() -> Case:
    rm = shared_pm("llama")
    some = targets(rm)
    return rm, some, search(Scorer(rm, some), [some_phrases(rm)], budget=24)


def test_reported_rewards_are_those_of_the_final_texts_alone(case: Case) -> None:
    rm, some, result = case
    assert result.layout
    for t, reward in zip(some, result.rewards, strict=True):
        assert reward == pytest.approx(reward_alone(rm, t, result.layout), abs=1e-4)


def test_the_budget_is_never_exceeded_in_the_texts_themselves(case: Case) -> None:
    rm, some, result = case
    for layout in (result.layout, result.flipped):
        assert 0 < cost(layout) <= 24
        for t in some:
            assert t.ids(rm, layout).numel() - t.ids(rm).numel() <= 24
    assert 0 < cost(search(Scorer(rm, some), [some_phrases(rm)], budget=5).layout) <= 5


def test_the_token_level_pass_raises_the_exact_mean_reward(case: Case) -> None:
    rm, some, result = case
    assert result.flipped != result.layout
    flipped = np.mean([reward_alone(rm, t, result.flipped) for t in some])
    assert flipped > result.rewards.mean() + 1e-4


def test_the_first_phrase_is_the_best_of_all_and_each_further_one_helps(case: Case) -> None:
    rm, some, result = case
    singles = {
        (p.text, slot): np.mean([reward_alone(rm, t, (placed(p, slot),)) for t in some])
        for p, slot in itertools.product(some_phrases(rm), SLOTS)
    }
    first = result.layout[0]
    assert singles[first.text, first.slot] == pytest.approx(max(singles.values()), abs=1e-5)
    means = [np.mean([reward_alone(rm, t, result.layout[:n]) for t in some]) for n in range(len(result.layout) + 1)]
    assert means == sorted(means)
    texts = [p.text for p in result.layout]
    assert len(set(texts)) == len(texts)


def test_the_search_ends_only_where_no_placement_beside_the_list_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    rm = shared_pm("llama")
    some = targets(rm)[:SCREEN]
    monkeypatch.setattr(search_module, "POOL", 1)  # a greedy round sees one placement: the others come from later screens
    result = search(Scorer(rm, some), [some_phrases(rm)], budget=24)
    used = {p.text for p in result.layout}
    further = [
        np.mean([reward_alone(rm, t, (*result.layout, placed(p, slot))) for t in some])
        for p, slot in itertools.product(some_phrases(rm), SLOTS)
        if p.text not in used and cost(result.layout) + p.tokens <= 24
    ]
    assert max(further, default=-np.inf) <= result.rewards.mean() + 1e-5


def test_every_text_that_is_scored_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, counted = shared_pm("llama"), []
    honest = search_module.rewards_from_prefix

    def counting(rm: RewardModel, clean: Any, texts: Any) -> torch.Tensor:
        counted.append(len(texts))
        return honest(rm, clean, texts)

    monkeypatch.setattr(search_module, "rewards_from_prefix", counting)
    some = targets(rm)
    result = search(Scorer(rm, some), [some_phrases(rm)], budget=24)
    assert result.figures.evaluations + result.figures.flip_evaluations == sum(counted) + len(
        some
    )  # and one gradient per target


def test_controls_spend_as_many_evaluations_as_they_may_and_no_more() -> None:
    rm = shared_pm("llama")
    some, pools = targets(rm), ([Phrase(f"{a} {b}", 4) for a, b in itertools.product("kmx", f"{i}w")] for i in range(99))
    for limit in (50, 301):
        spent = search(Scorer(rm, some, limit), pools, 24).figures.evaluations
        assert limit - SCREEN < spent <= limit


def test_a_list_of_its_own_ends_once_it_outranks_the_chosen_answer() -> None:
    rm = shared_pm("llama")
    t = replace(target(rm, 0, BAD[0]), chosen=-100.0, reward=-200.0)
    pool = screen(Scorer(rm, [t]), some_phrases(rm), 24)
    scorer = Scorer(rm, [t])
    compose(scorer, pool, 24, until=1.0)
    assert len(scorer.layout) == 1
    assert scorer.now[0] > t.chosen


def test_a_flip_never_makes_a_phrase_longer() -> None:
    rm = shared_pm("llama")
    layout = tuple(placed(p, "end") for p in some_phrases(rm)[:3])
    scorer = Scorer(rm, targets(rm))
    changed = flip_tokens(scorer, layout, scorer.rewards([layout])[0])
    assert changed != layout
    for before, after in zip(layout, changed, strict=True):
        assert after.tokens == count_tokens(rm, after.text) <= before.tokens
        assert after.slot == before.slot


def test_phrases_are_put_between_whole_sentences_and_nothing_is_lost() -> None:
    layout = tuple(
        Placement(w, 1, slot=s) for w, s in (("B b.", "end"), ("A a.", "start"), ("M m.", "middle"), ("C c.", "end"))
    )
    assert place("One. Two. Three.", layout) == "A a. One. Two. M m. Three. B b. C c."
    assert [text for text, added in pieces("One. Two. Three.", layout) if added] == ["A a.", "M m.", "B b.", "C c."]
    assert place("no end", layout) == "A a. no end M m. B b. C c."
