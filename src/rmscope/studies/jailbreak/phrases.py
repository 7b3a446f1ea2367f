"""Phrases for a jailbreak: mined where reported features fire hardest, or drawn as controls.

A mined phrase is a stretch of whole words that ends where the feature peaks on the fit split. It is the shortest one that,
alone as the response to the same prompt, still brings the feature to :data:`PEAK_SHARE` of that peak. Controls are phrases
drawn blind to features, phrases of features without effect, and the words of the phrases themselves in random order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.evaluation.controls import match_by_traits
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae

PEAK_SHARE = 0.8
"""The share of the feature's peak that a phrase must reach alone."""
WORDS = 8
"""The longest phrase, in words."""
CONTEXTS = 6
"""Contexts tried per feature: its hardest firings."""
PHRASES_PER_FEATURE = 2
"""At most so many phrases per feature."""
CHUNK = 4096
"""Stored tokens encoded at once."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase, its tokens within a text, and the feature that it was mined for (None for a blind one)."""

    text: str
    tokens: int
    site: str | None = None
    feature: int | None = None
    keeps: float | None = None
    """The share of the feature's peak that the phrase reaches alone."""


@dataclass(frozen=True, slots=True)
class Firing:
    """A hard firing: pair (place in the fit split), side, position in the text, activation."""

    pair: int
    side: str
    position: int
    value: float


class FeatureMeans(NamedTuple):
    """A feature on the fit split: responses in which it fires, its mean mass Σ_t f_tj |d_j| there, mean exact effect."""

    fires: int
    mass: float
    effect: float


def count_tokens(rm: RewardModel, text: str) -> int:
    """Tokens that a phrase adds to a text in which a space precedes it."""
    return len(rm.tokenizer(f" {text}", add_special_tokens=False).input_ids)


def normal_form(text: str) -> str:
    """Lower case, letters and digits only: equal for duplicates."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def hardest_firings(store: ActivationStore, sae: Sae, site: str, features: Sequence[int]) -> dict[int, list[Firing]]:
    """Each feature's :data:`CONTEXTS` hardest firings on stored response tokens, one per response, the hardest first."""
    region, pair, position = (store.column(site, name).numpy() for name in ("region", "pair", "position"))
    response = np.flatnonzero((region > 0) & (position > 0))
    wanted = torch.as_tensor(list(features))
    rows, firing, values = [], [], []
    for start in range(0, response.size, CHUNK):
        part = torch.from_numpy(response[start : start + CHUNK])
        active = sae.active(store.rows(site, part))
        mask = torch.isin(active.feature, wanted)
        rows.append(part[active.token[mask]].numpy())
        firing.append(active.feature[mask].numpy())
        values.append(active.value[mask].numpy())
    row, feature, value = np.concatenate(rows), np.concatenate(firing), np.concatenate(values)
    hardest: dict[int, list[Firing]] = {}
    for j in features:
        at = np.flatnonzero(feature == j)
        of_response: dict[tuple[int, str], Firing] = {}
        for i in at[np.argsort(-value[at], kind="stable")]:
            key = int(pair[row[i]]), SIDES[int(region[row[i]]) - 1]
            of_response.setdefault(key, Firing(*key, int(position[row[i]]), float(value[i])))
            if len(of_response) == CONTEXTS:
                break
        hardest[j] = list(of_response.values())
    return hardest


def word_spans(rm: RewardModel, ids: Tensor, start: int, position: int) -> list[str]:
    """Stretches of 1 to :data:`WORDS` words of the response ``ids[start:]`` that end with the word at ``position``.

    The last word is whole and keeps the punctuation mark after it. Empty where the position is a special token.
    """
    special = set(rm.tokenizer.all_special_ids)
    if int(ids[position]) in special:
        return []
    plain = [int(i) for i in ids[start:] if int(i) not in special]
    whole = rm.tokenizer.decode(plain)
    end = len(rm.tokenizer.decode([int(i) for i in ids[start : position + 1]]))
    end += len(re.match(r"[^\W_'’]*", whole[end:]).group())  # type: ignore[union-attr]
    end += len(re.match(r"[.!?]?", whole[end:]).group())  # type: ignore[union-attr]
    firsts = [m.start() for m in re.finditer(r"\S+", whole[:end])][-WORDS:]
    spans = [whole[first:end].strip() for first in reversed(firsts)]
    return [text for text in spans if normal_form(text) and "\n" not in text and "\ufffd" not in text]


@torch.no_grad()
def peaks_alone(
    rm: RewardModel, sae: Sae, site: str, pair: Pair, texts: Sequence[str], feature: int, empty: Tensor
) -> list[float]:
    """The feature's largest activation in each text as the whole response to the pair's prompt, without special tokens.

    ``empty`` holds the token ids of the prompt with an empty response.
    """
    special = torch.tensor(rm.tokenizer.all_special_ids)
    ids = [rm.text_ids(pair.prompt, text) for text in texts]
    peaks = [0.0] * len(texts)
    for batch in rm.text_batches(ids):
        stream = rm.streams(batch, [site])[site]
        for text in batch.texts:
            first = response_start(rm, ids[text.pair], empty)
            response = ids[text.pair][first:]
            f = sae.encode(stream[text.row, text.columns[first:].to(stream.device)].float().cpu())[:, feature]
            f = f[~torch.isin(response, special)]
            peaks[text.pair] = float(f.max()) if f.numel() else 0.0
    return peaks


def mine_phrases(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    store: ActivationStore,
    pairs: Sequence[Pair],
    tokens: Sequence[PairTokens],
    wanted: Mapping[str, Sequence[int]],
    most: int,
    progress: Progress = silent,
) -> list[Phrase]:
    """At most ``most`` different phrases of the wanted features, one feature of each site in turn.

    ``pairs`` and ``tokens`` are those of the fit split, in the order of the store. ``wanted[site]`` lists features, the most
    important first.
    """
    firings = {site: hardest_firings(store, saes[site], site, features) for site, features in wanted.items()}
    turns = max((len(f) for f in wanted.values()), default=0)
    order = [(site, f[turn]) for turn in range(turns) for site, f in wanted.items() if turn < len(f)]
    phrases: dict[str, Phrase] = {}
    for done, (site, j) in enumerate(order):
        new = 0
        for firing in firings[site][j]:
            phrase = _shortest(rm, saes[site], site, j, firing, pairs[firing.pair], tokens[firing.pair])
            if phrase is not None and normal_form(phrase.text) not in phrases:
                phrases[normal_form(phrase.text)] = phrase
                new += 1
            if new == PHRASES_PER_FEATURE or len(phrases) == most:
                break
        progress(done + 1, len(order), "features mined for phrases")
        if len(phrases) == most:
            break
    return list(phrases.values())


def _shortest(
    rm: RewardModel, sae: Sae, site: str, feature: int, firing: Firing, pair: Pair, tokens: PairTokens
) -> Phrase | None:
    """The shortest stretch at a firing that alone keeps it, if there is one."""
    ids, empty = tokens.side(firing.side), rm.text_ids(pair.prompt, "")
    texts = word_spans(rm, ids, response_start(rm, ids, empty), firing.position)
    if not texts:
        return None
    for text, peak in zip(texts, peaks_alone(rm, sae, site, pair, texts, feature, empty), strict=True):
        if peak >= PEAK_SHARE * firing.value:
            return Phrase(text, count_tokens(rm, text), site, feature, peak / firing.value)
    return None


def blind_phrases(rm: RewardModel, pairs: Sequence[Pair], like: Sequence[Phrase], seed: int) -> Iterator[list[Phrase]]:
    """Lists of as many phrases as ``like``, of as many words each, from random places of the pairs' responses."""
    rng = random.Random(f"{seed}/blind")
    texts = [pair.side(side).split() for pair in pairs for side in SIDES]
    while True:
        drawn: dict[str, Phrase] = {}
        for phrase in like:
            n = len(phrase.text.split())
            able = [words for words in texts if len(words) >= n]
            for _ in range(100 if able else 0):
                words = rng.choice(able)
                first = rng.randrange(len(words) - n + 1)
                text = " ".join(words[first : first + n])
                if normal_form(text) and normal_form(text) not in drawn:
                    drawn[normal_form(text)] = Phrase(text, count_tokens(rm, text))
                    break
        yield list(drawn.values())


def shuffle_phrases(phrases: Sequence[str], rng: random.Random) -> list[str]:
    """The words of all phrases in random order, cut into phrases of as many words as before."""
    words = [word for text in phrases for word in text.split()]
    rng.shuffle(words)
    lengths = [len(text.split()) for text in phrases]
    ends = np.cumsum(lengths)
    return [" ".join(words[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def features_without_effect(
    means: Mapping[int, FeatureMeans], up: Sequence[int], bound: float, seed: int
) -> Iterator[list[int]]:
    """Lists of features without effect, no feature in two lists, until there are no more.

    Each list has one feature for each of ``up`` (while they last), matched in responses fired in and in mass. A feature is
    without effect where |mean effect| <= ``bound``; ``means`` holds the features that were ablated exactly.
    """
    size = 1 + max([*means, *up], default=0)
    traits = np.full((size, 2), 1e-9)
    free = np.zeros(size, dtype=bool)
    for j, mean in means.items():
        traits[j] = mean.fires + 1, mean.mass + 1e-9
        free[j] = abs(mean.effect) <= bound
    used = list(up)
    while True:
        matched = match_by_traits(traits, free, up, used, seed).tolist()
        if not matched:
            return
        used += matched
        yield matched
