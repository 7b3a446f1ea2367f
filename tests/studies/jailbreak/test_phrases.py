"""Phrases: a mined one fires its feature alone, in whole words of the fit split; the controls are fair."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rmscope.activations.harvest import harvest
from rmscope.activations.store import ActivationStore
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import Pair
from rmscope.sae.base import Sae
from rmscope.studies.jailbreak.phrases import (
    PEAK_SHARE,
    FeatureMeans,
    Phrase,
    blind_phrases,
    count_tokens,
    features_without_effect,
    hardest_firings,
    mine_phrases,
    normal_form,
    shuffle_phrases,
    word_spans,
)
from tests.model.small import SENTENCES, shared_pm, small_sae, user

SITE = "resid_post.1"
PAIRS = [Pair(str(i), user(f"Is it {i}?"), f"{SENTENCES[i % 5]} {i}.", f"{SENTENCES[(i + 2) % 5]} {i}") for i in range(10)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, Sae, list[int]]:
    rm, folder = shared_pm("llama"), Path(tmp_path_factory.mktemp("store"))
    store, sae = harvest(rm, PAIRS, [SITE], folder), small_sae()
    rows = torch.arange(store.tokens(SITE))
    counts = torch.bincount(sae.active(store.rows(SITE, rows)).feature, minlength=sae.m)
    return store, sae, counts.argsort(descending=True)[:8].tolist()


def test_the_hardest_contexts_are_the_largest_activations_of_the_responses(
    case: tuple[ActivationStore, Sae, list[int]],
) -> None:
    store, sae, features = case
    rm = shared_pm("llama")
    tokens = rm.tokenize_all(PAIRS)
    for j, contexts in hardest_firings(store, sae, SITE, features).items():
        values = [c.value for c in contexts]
        assert values == sorted(values, reverse=True)
        assert len({(c.pair, c.side) for c in contexts}) == len(contexts)
        peaks = []
        for i, t in enumerate(tokens):
            for side in ("chosen", "rejected"):
                x = rm.prefill(t.side(side), [SITE]).streams[SITE][t.divergence :]
                peaks.append((float(sae.encode(x)[:, j].max()), i, side))
        assert values[0] == pytest.approx(max(peaks)[0], rel=0.05)  # the store holds bfloat16


def test_a_mined_phrase_alone_keeps_the_firing_and_is_text_of_the_fit_split(
    case: tuple[ActivationStore, Sae, list[int]],
) -> None:
    store, sae, features = case
    rm = shared_pm("llama")
    tokens = rm.tokenize_all(PAIRS)
    found = mine_phrases(rm, {SITE: sae}, store, PAIRS, tokens, {SITE: features}, 12)
    assert found
    assert len({normal_form(p.text) for p in found}) == len(found) <= 12
    peaks = hardest_firings(store, sae, SITE, features)
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
        assert (
            best >= PEAK_SHARE * peaks[phrase.feature][-1].value * 0.95
        )  # its own context's peak is not below the last one's


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
    texts = ["Thank you! No problem.", "You're right.", "yes"]
    mixed = shuffle_phrases(texts, random.Random(1))
    assert sorted(" ".join(mixed).split()) == sorted(" ".join(texts).split())
    assert [len(t.split()) for t in mixed] == [4, 2, 1]
    assert mixed != texts


def test_features_without_effect_are_weak_matched_and_never_used_twice() -> None:
    means = {j: FeatureMeans(10 + j, 5.0 + j, 0.5 if j < 5 else 0.001) for j in range(30)}
    lists = list(features_without_effect(means, [0, 1, 2], 0.01, seed=0))
    drawn = [j for one in lists for j in one]
    assert len(drawn) == len(set(drawn)) == 25
    assert min(drawn) >= 5
    assert np.mean(lists[0]) < 15  # the nearest ones in firing and mass come first
