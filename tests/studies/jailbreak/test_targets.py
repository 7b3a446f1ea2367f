"""Bad texts: one per prompt, each below the chosen answer, and every prompt without one is counted."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak import targets as targets_module
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import DRAWS, make_targets, nonsense, shuffle_words
from tests.model.small import SENTENCES, shared_pm, user

CONFIG = JailbreakConfig(budget=24)


def pairs(n: int = 9) -> list[Pair]:
    return [Pair(str(i), user(f"Is it {i}?"), SENTENCES[i % 5], SENTENCES[(i + 1) % 5]) for i in range(n)]


def test_a_bad_text_is_below_the_chosen_answer_or_is_not_used() -> None:
    rm, left_out, some = shared_pm("llama"), Counter[str](), pairs()
    made = make_targets(rm, some, 9, CONFIG, left_out)
    assert made
    assert len(made) + left_out.total() == len(some)
    for t in made:
        bad, chosen, rejected = rm.score_texts(t.pair.prompt, [t.bad, t.pair.chosen, t.pair.rejected]).tolist()
        assert (t.reward, t.chosen, t.rejected) == pytest.approx((bad, chosen, rejected), abs=1e-4)
        assert bad < chosen
    assert len({t.pair.prompt_key for t in made}) == len(made)


def test_a_prompt_gives_one_target_however_many_pairs_it_has() -> None:
    rm, left_out = shared_pm("llama"), Counter[str]()
    twice = [Pair(f"{p.id}{side}", p.prompt, p.chosen, p.rejected) for p in pairs(4) for side in "ab"]
    twice += [Pair(f"g{i}", user(f"Was it {i}?"), *SENTENCES[:2], {"group": "one prompt"}) for i in range(5)]
    made = make_targets(rm, twice, 99, CONFIG, left_out)
    assert len({t.pair.prompt_key for t in made}) == len(made)
    assert len(made) + left_out.total() == 5


def test_a_prompt_whose_bad_texts_all_score_above_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, left_out, some = shared_pm("llama"), Counter[str](), pairs()
    above = lambda _rm, _clean, texts: torch.tensor([0.0, 0.0] if len(texts) == 2 else [1.0])  # noqa: E731
    monkeypatch.setattr(targets_module, "rewards_from_prefix", above)
    assert make_targets(rm, some, 9, CONFIG, left_out) == []
    assert left_out.total() == len(some)
    assert all(f"none of {DRAWS}" in reason for reason in left_out)


def test_words_are_shuffled_and_nonsense_has_the_sentences_asked_for() -> None:
    assert sorted(shuffle_words("a b c d", random.Random(0)).split()) == ["a", "b", "c", "d"]
    assert [len(s.split()) for s in sentences(nonsense([3, 1, 5], random.Random(0)))] == [3, 1, 5]
