"""Phrases: a mined one fires its feature alone, in whole words of the fit split; the controls are fair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.activations.harvest import harvest
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import Pair
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.phrases import (
    PEAK_SHARE,
    blind_phrases,
    features_without_effect,
    hardest_firings,
    mine_phrases,
    normal_form,
    shuffle_phrases,
    word_spans,
)
from rmscope.studies.jailbreak.targets import SLOTS, Phrase, Placement, count_tokens
from tests.model.small import SENTENCES, shared_pm, small_sae, user

SITE = "resid_post.1"
PAIRS = [Pair(str(i), user(f"Is it {i}?"), f"{SENTENCES[i % 5]} {i}.", f"{SENTENCES[(i + 2) % 5]} {i}") for i in range(10)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, list[int]]:
    """A store of ten pairs with an SAE, and the features that fire most often."""
    rm, folder = shared_pm("llama"), Path(tmp_path_factory.mktemp("store"))
    store, sae = harvest(rm, PAIRS, [SITE], folder), small_sae()
    rows = torch.arange(store.tokens(SITE))
    counts = torch.bincount(sae.active(store.rows(SITE, rows)).feature, minlength=sae.m)
    inputs = Inputs(rm, {SITE: sae}, store, PAIRS, rm.tokenize_all(PAIRS), {}, {}, {}, 0.0)
    return inputs, counts.argsort(descending=True)[:8].tolist()


def test_the_hardest_contexts_are_the_largest_activations_of_the_responses(case: tuple[Inputs, list[int]]) -> None:
    inputs, features = case
    rm, sae, tokens = inputs.rm, inputs.saes[SITE], inputs.tokens
    hardest = hardest_firings(inputs, SITE, features)
    assert set(hardest["feature"]) == set(features)
    sides = [(t.side(side), t.divergence) for t in tokens for side in ("chosen", "rejected")]
    peaks = torch.stack([sae.encode(rm.prefill(ids, [SITE]).streams[SITE][start:]).amax(0) for ids, start in sides]).amax(0)
    for j in features:
        contexts = hardest.filter(pl.col("feature") == j)
        values = contexts["value"].to_list()
        assert values == sorted(values, reverse=True)
        assert not contexts.select("pair", "region").is_duplicated().any()
        assert values[0] == pytest.approx(float(peaks[j]), rel=0.05)  # the store holds bfloat16


def test_a_mined_phrase_alone_keeps_the_firing_and_is_text_of_the_fit_split(case: tuple[Inputs, list[int]]) -> None:
    inputs, features = case
    rm, sae = inputs.rm, inputs.saes[SITE]
    found = mine_phrases(inputs, {SITE: features}, 12)
    assert found
    assert len({normal_form(p.text) for p in found}) == len(found) <= 12
    hardest = hardest_firings(inputs, SITE, features)
    for phrase in found:
        assert any(phrase.text in f"{pair.chosen}\n{pair.rejected}" for pair in PAIRS)
        assert phrase.tokens == count_tokens(rm, phrase.text)
        assert phrase.feature is not None
        best = 0.0
        for pair in PAIRS:
            ids = rm.text_ids(pair.prompt, phrase.text)
            start = response_start(rm, ids, rm.text_ids(pair.prompt, ""))
            x = rm.prefill(ids, [SITE]).streams[SITE][start:]
            best = max(best, float(sae.encode(x)[:, phrase.feature].max()))
        last = hardest.filter(pl.col("feature") == phrase.feature)["value"][-1]
        assert best >= PEAK_SHARE * last * 0.95  # its own context's peak is not below the last one's


def test_spans_are_whole_words_from_one_up_that_end_at_the_position() -> None:
    rm = shared_pm("llama")
    prompt = user("What is the capital of France?")
    ids = rm.text_ids(prompt, "It is Paris, on the Seine. You would like it.")
    start = response_start(rm, ids, rm.text_ids(prompt, ""))
    at = next(i for i in range(start, ids.numel()) if "Sein" in rm.tokenizer.decode(ids[start : i + 1]))
    found = word_spans(rm, ids, start, at)
    assert found == [
        "Seine.",
        "the Seine.",
        "on the Seine.",
        "Paris, on the Seine.",
        "is Paris, on the Seine.",
        "It is Paris, on the Seine.",
    ]


def test_blind_phrases_are_as_many_stretches_of_as_many_words() -> None:
    rm = shared_pm("llama")
    like = [Phrase("a b c", 3), Phrase("d", 1), Phrase("e f", 2)]
    lists = blind_phrases(rm, PAIRS, like, seed=3)
    first, second = next(lists), next(lists)
    assert [p.text for p in first] != [p.text for p in second]
    for drawn in (first, second):
        assert sorted(len(p.text.split()) for p in drawn) == [1, 2, 3]
        assert all(any(p.text in f"{pair.chosen}\n{pair.rejected}" for pair in PAIRS) for p in drawn)
        assert all(p.feature is None for p in drawn)


def test_shuffling_keeps_the_words_and_how_many_a_phrase_has() -> None:
    rm, texts = shared_pm("llama"), ["Thank you! No problem.", "You're right.", "yes"]
    mixed = shuffle_phrases(rm, tuple(Placement(t, 9, slot=s) for t, s in zip(texts, SLOTS, strict=True)), "1")
    assert sorted(" ".join(p.text for p in mixed).split()) == sorted(" ".join(texts).split())
    assert [len(p.text.split()) for p in mixed] == [4, 2, 1]
    assert [p.slot for p in mixed] == list(SLOTS)
    assert [p.tokens for p in mixed] == [count_tokens(rm, p.text) for p in mixed]
    assert [p.text for p in mixed] != texts


def test_features_without_effect_are_weak_matched_and_never_used_twice() -> None:
    rows = [{"feature": j, "fires": 10 + j, "mass": 5.0 + j, "effect": 0.5 if j < 5 else 0.001} for j in range(30)]
    means = pl.DataFrame(rows)
    lists = list(features_without_effect(means, [0, 1, 2], 0.01, seed=0))
    drawn = [j for one in lists for j in one]
    assert len(drawn) == len(set(drawn)) == 25
    assert min(drawn) >= 5
    assert np.mean(lists[0]) < 15  # the nearest ones in firing and mass come first
