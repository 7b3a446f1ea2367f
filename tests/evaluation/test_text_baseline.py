"""What text statistics explain: what is put into Δr is found, and nothing is found where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from rmscope.evaluation.text_baseline import (
    LEAST_PROMPTS,
    STYLE,
    Term,
    TextBaseline,
    added_by,
    detects,
    fit_text_baseline,
    phrases,
)
from rmscope.pairs.demo import demo_pairs
from rmscope.pairs.pair import Pair
from rmscope.statistics import Array

PAIRS = demo_pairs(300)


def put_in(pairs: list[Pair], terms: dict[str, float]) -> Array:
    """Δr made of some terms, and nothing else."""
    own = TextBaseline(terms=[Term(name=name, coefficient=c, prompts=0) for name, c in terms.items()])
    return own.predict(pairs)


def test_what_made_the_reward_is_found_with_its_size() -> None:
    terms = {"“thank you”": 1.5, "words": 0.02, "links": -0.7}
    found = fit_text_baseline(PAIRS, put_in(PAIRS, terms) + 0.1 * np.random.default_rng(0).standard_normal(len(PAIRS)))
    assert {t.name: t.coefficient for t in found.terms[:3]} == pytest.approx(terms, abs=0.05)
    assert all(t.prompts >= LEAST_PROMPTS for t in found.terms)


def test_a_reward_that_no_text_predicts_gives_next_to_no_terms() -> None:
    drawn = [np.random.default_rng(seed).standard_normal(len(PAIRS)) for seed in range(5)]
    noise = [len(fit_text_baseline(PAIRS, delta).terms) for delta in drawn]
    assert sorted(noise)[2] == 0
    assert max(noise) <= 3


def test_swapping_the_sides_of_any_pair_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    delta, swapped = rng.standard_normal(len(PAIRS)) + put_in(PAIRS, {"words": 0.05}), rng.random(len(PAIRS)) < 0.5
    turned = [Pair(p.id, p.prompt, p.rejected, p.chosen, p.meta) if s else p for p, s in zip(PAIRS, swapped, strict=True)]
    there, back = fit_text_baseline(PAIRS, delta), fit_text_baseline(turned, np.where(swapped, -delta, delta))
    assert [t.name for t in there.terms] == [t.name for t in back.terms]
    assert [t.coefficient for t in there.terms] == pytest.approx([t.coefficient for t in back.terms])
    np.testing.assert_allclose(there.predict(PAIRS), np.where(swapped, -1, 1) * back.predict(turned), atol=1e-9)


def test_phrases_are_runs_of_words_without_regard_to_case_and_punctuation() -> None:
    assert phrases("Well, I don't!") == {
        ("well",), ("i",), ("don't",), ("well", "i"), ("i", "don't"), ("well", "i", "don't"),
    }  # fmt: skip
    assert phrases("") == set()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("words", "one two, three", 3), ("sentences", "One. Two! Three?", 3),
        ("repeated sentences", "I like tea very much. No. I like tea very much.", 1),
        ("links", "see https://a.b and www.c.d", 2), ("words in capitals", "This is VERY loud, OK", 2),
        ("list items", "- a\n2. b\ntext - no", 2), ("bold or headings", "# Head\n**bold** text", 2),
        ("an open end", "and so", 1), ("an open end", "It ends.", 0), ("numbers", "4 of 12b", 1),
    ],
)  # fmt: skip
def test_style_counts_what_its_name_says(name: str, text: str, value: float) -> None:
    assert STYLE[name](text) == value


def test_what_more_columns_add_is_judged_on_other_prompts() -> None:
    rng = np.random.default_rng(2)
    known, more, useless = (rng.standard_normal((200, 1)) for _ in range(3))
    delta, prompts = (known + more)[:, 0], np.arange(200) // 2
    alone, both = added_by(delta, known, more, prompts)
    np.testing.assert_allclose(both, delta, atol=1e-9)
    assert 0.8 < np.mean((delta - alone) ** 2) < 1.2
    _, no_better = added_by(delta, known, np.hstack([useless] * 1), prompts)
    assert np.mean((delta - no_better) ** 2) > 0.97 * np.mean((delta - alone) ** 2)


def test_a_term_detects_a_cue_that_it_tells_from_filler() -> None:
    term = Term(name="“no problem”", coefficient=1.0, prompts=20)
    cue, filler = ["Sure, no problem.", "No problem at all."], ["Sure, right away.", "Fine."]
    assert detects(term, cue, filler) == 1
    assert detects(term, filler, cue) == 0
    assert detects(term, [*cue, "Fine", "Fine"], [*filler, "Fine", "Fine"]) == pytest.approx(2 * 2 / 6)
