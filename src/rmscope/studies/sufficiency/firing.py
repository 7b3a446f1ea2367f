"""Where in a text a feature fires: the sentence around its hardest firing, and a phrase swapped for neutral words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmscope.evaluation.selection import Responses
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import FILLERS
from rmscope.run.examples import token_texts
from rmscope.sae.base import Sae

SENTENCES = 3
"""Sentences tried for each feature."""
WORDS = 30
"""A longer sentence is cut to this many words around the firing."""
PHRASE = 0.5
"""A phrase is the run of tokens around the peak on which the feature fires with at least this share of it."""


class Swap(NamedTuple):
    """A text with a phrase swapped for neutral words."""

    text: str
    phrase: str
    words: str


def spelling(rm: RewardModel, ids: Tensor, start: int) -> tuple[str, list[int]]:
    """The text of the tokens from ``start`` on, without special tokens, and where each token begins in it; last, its end."""
    special = set(rm.tokenizer.all_special_ids)
    texts = ["" if int(i) in special else text for i, text in zip(ids[start:], token_texts(rm, ids[start:]), strict=True)]
    return "".join(texts), np.cumsum([0, *map(len, texts)]).tolist()


def sentence_at(text: str, place: int) -> str:
    """The sentence around the character ``place``; of a long one, :data:`WORDS` words around it."""
    borders = [0, *(m.end() for m in re.finditer(r"(?<=[.!?])\s+", text)), len(text)]
    first = max(b for b in borders[:-1] if b <= place)
    last = min((b for b in borders[1:] if b > place), default=len(text))
    words = list(re.finditer(r"\S+", text[first:last]))
    at = sum(w.end() <= place - first for w in words)
    cut = words[max(0, min(at - WORDS // 2, len(words) - WORDS)) :][:WORDS]
    return " ".join(w.group() for w in cut)


def firing_sentences(
    rm: RewardModel,
    sae: Sae,
    responses: Responses,
    pairs: Sequence[Pair],
    tokens: Sequence[PairTokens],
    features: Sequence[int],
) -> tuple[dict[int, list[str]], dict[int, float]]:
    """(each feature's sentences, those where it fires hardest first; the 95th percentile of its activations where it fires).

    The pair numbers of the stored ``responses`` are places in ``pairs`` and ``tokens``.
    """
    peaks: dict[int, list[tuple[float, int, int]]] = {j: [] for j in features}
    values: dict[int, list[Tensor]] = {j: [] for j in features}
    for i in range(len(responses)):
        active = sae.active(responses.x(i))
        for j in set(active.feature.unique().tolist()) & peaks.keys():
            at = active.feature == j
            value, token = active.value[at], active.token[at]
            values[j].append(value)
            peaks[j].append((float(value.max()), i, int(token[value.argmax()])))
    sentences: dict[int, list[str]] = {}
    for j in features:
        sentences[j] = []
        for _, i, at_token in sorted(peaks[j], reverse=True):
            pair, side = int(responses.pair[i]), responses.side[i]
            ids = tokens[pair].side(side)
            start = response_start(rm, ids, rm.text_ids(pairs[pair].prompt, ""))
            text, places = spelling(rm, ids, start)
            place = places[min(max(0, tokens[pair].divergence + at_token - start), len(places) - 1)]
            sentence = sentence_at(text, min(place + 1, max(0, len(text) - 1)))  # + 1: past the space that opens a token
            if sentence and sentence not in sentences[j]:
                sentences[j].append(sentence)
            if len(sentences[j]) == SENTENCES:
                break
    tops = {j: float(torch.cat(v).quantile(0.95)) if v else 0.0 for j, v in values.items()}
    return sentences, tops


def swap_phrase(text: str, places: Sequence[int], f: Tensor, number: int) -> Swap | None:
    """The text with the phrase on which ``f`` [tokens] peaks swapped for as many neutral words.

    The words come from the filler sentence ``number``. A phrase without a word is deleted. None where the peak has no text
    (a special token).
    """
    peak = int(f.argmax())
    low = high = peak
    while low > 0 and f[low - 1] >= PHRASE * f[peak]:
        low -= 1
    while high + 1 < len(f) and f[high + 1] >= PHRASE * f[peak]:
        high += 1
    a, b = places[low], places[high + 1]
    while a < b and text[a].isspace():
        a += 1
    if a == b:
        return None
    while a > 0 and _inner(text[a - 1]) and _inner(text[a]):
        a -= 1
    while b < len(text) and _inner(text[b - 1]) and _inner(text[b]):
        b += 1
    phrase = text[a:b]
    words = neutral_words(len(re.findall(r"[\w'’]+", phrase)), number)
    if phrase[0].isupper():
        words = words[:1].upper() + words[1:]
    return Swap(text[:a] + words + text[b:], phrase, words)


def _inner(character: str) -> bool:
    return character.isalnum() or character in "_'’"


def neutral_words(n: int, number: int) -> str:
    """The first ``n`` words of the filler sentences, from sentence ``number`` on."""
    words: list[str] = []
    while len(words) < n:
        words += re.findall(r"[a-z']+", FILLERS[number % len(FILLERS)].lower())
        number += 1
    return " ".join(words[:n])


def nearest_filler(text: str) -> str:
    """The neutral sentence whose length is nearest."""
    return min(FILLERS, key=lambda filler: abs(len(filler) - len(text)))
