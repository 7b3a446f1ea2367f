"""Phrases for a jailbreak: mined where reported features fire hardest, or drawn blind to features.

A mined phrase is the shortest stretch of whole words, ending where the feature peaks on the fit split, that alone as the
response to the same prompt still brings the feature to :data:`KEEPS` of that peak. Blind phrases are stretches of as many
words from the same responses, drawn at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.evaluation.controls import alike
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start, text_batches
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae

KEEPS = 0.8
"""The share of the peak that a phrase standing alone must reach."""
WORDS = 8
"""The longest phrase, in words."""
CONTEXTS = 6
"""Contexts of a feature that are tried, its hardest firings."""
A_FEATURE = 2
"""Phrases that a feature gives at most."""
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase, its tokens within a text, and the feature that it was mined for (none for a blind one)."""

    text: str
    tokens: int
    site: str | None = None
    feature: int | None = None
    keeps: float | None = None
    """What the phrase alone reaches of the feature's peak."""


@dataclass(frozen=True, slots=True)
class Context:
    """A hard firing: pair (place in the fit split), side, position in the text, activation."""

    pair: int
    side: str
    position: int
    value: float


def count_tokens(rm: RewardModel, text: str) -> int:
    """Tokens that a phrase adds to a text in which a space stands before it."""
    return len(rm.tokenizer(f" {text}", add_special_tokens=False).input_ids)


def normal(text: str) -> str:
    """What duplicates have in common: lower case, letters and digits only."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def hardest(store: ActivationStore, sae: Sae, site: str, features: Sequence[int]) -> dict[int, list[Context]]:
    """Each feature's :data:`CONTEXTS` hardest firings on stored response tokens, one a response, the hardest first."""
    region, pair, position = (store.column(site, name).numpy() for name in ("region", "pair", "position"))
    response = np.flatnonzero((region > 0) & (position > 0))
    wanted = torch.as_tensor(list(features))
    rows, firing, values = [], [], []
    for start in range(0, response.size, CHUNK):
        part = torch.from_numpy(response[start : start + CHUNK])
        active = sae.active(store.rows(site, part))
        mine = torch.isin(active.feature, wanted)
        rows.append(part[active.token[mine]].numpy())
        firing.append(active.feature[mine].numpy())
        values.append(active.value[mine].numpy())
    row, feature, value = np.concatenate(rows), np.concatenate(firing), np.concatenate(values)
    found: dict[int, list[Context]] = {}
    for j in features:
        at = np.flatnonzero(feature == j)
        contexts: dict[tuple[int, str], Context] = {}
        for i in at[np.argsort(-value[at], kind="stable")]:
            key = int(pair[row[i]]), SIDES[int(region[row[i]]) - 1]
            contexts.setdefault(key, Context(*key, int(position[row[i]]), float(value[i])))
            if len(contexts) == CONTEXTS:
                break
        found[j] = list(contexts.values())
    return found


def spans(rm: RewardModel, ids: Tensor, start: int, position: int) -> list[str]:
    """Stretches of 1 .. :data:`WORDS` words of the response ``ids[start:]`` that end with the word at ``position``.

    The word is taken whole, with the punctuation mark behind it. Empty where the position is a special token.
    """
    special = set(rm.tokenizer.all_special_ids)
    if int(ids[position]) in special:
        return []
    kept = [int(i) for i in ids[start:] if int(i) not in special]
    whole = rm.tokenizer.decode(kept)
    end = len(rm.tokenizer.decode([int(i) for i in ids[start : position + 1]]))
    end += len(re.match(r"[^\W_'’]*", whole[end:]).group())  # type: ignore[union-attr]
    end += len(re.match(r"[.!?]?", whole[end:]).group())  # type: ignore[union-attr]
    firsts = [m.start() for m in re.finditer(r"\S+", whole[:end])][-WORDS:]
    found = [whole[first:end].strip() for first in reversed(firsts)]
    return [text for text in found if normal(text) and "\n" not in text and "\ufffd" not in text]


@torch.no_grad()
def peaks_alone(
    rm: RewardModel, sae: Sae, site: str, pair: Pair, texts: Sequence[str], feature: int, empty: Tensor
) -> list[float]:
    """The feature's largest activation in each text as the whole response to the pair's prompt, special tokens left out."""
    special = torch.tensor(rm.tokenizer.all_special_ids)
    ids = [rm.text_ids(pair.prompt, text) for text in texts]
    out = [0.0] * len(texts)
    for batch in text_batches(rm, ids):
        stream = rm.streams(batch, [site])[site]
        for text in batch.texts:
            first = response_start(rm, ids[text.pair], empty)
            response = ids[text.pair][first:]
            f = sae.encode(stream[text.row, text.columns[first:].to(stream.device)].float().cpu())[:, feature]
            f = f[~torch.isin(response, special)]
            out[text.pair] = float(f.max()) if f.numel() else 0.0
    return out


def mine(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    store: ActivationStore,
    pairs: Sequence[Pair],
    tokens: Sequence[PairTokens],
    wanted: Mapping[str, Sequence[int]],
    most: int,
    progress: Progress = silent,
) -> list[Phrase]:
    """At most ``most`` phrases of the wanted features, each once, the features in turn over the sites.

    ``pairs`` and ``tokens`` are those of the fit split that the store holds, in its order; ``wanted[site]`` has the
    features with the most important first.
    """
    contexts = {site: hardest(store, saes[site], site, features) for site, features in wanted.items()}
    turns = max((len(f) for f in wanted.values()), default=0)
    order = [(site, f[turn]) for turn in range(turns) for site, f in wanted.items() if turn < len(f)]
    found: dict[str, Phrase] = {}
    for done, (site, j) in enumerate(order):
        kept = 0
        for context in contexts[site][j]:
            phrase = _shortest(rm, saes[site], site, j, context, pairs[context.pair], tokens[context.pair])
            if phrase is not None and normal(phrase.text) not in found:
                found[normal(phrase.text)] = phrase
                kept += 1
            if kept == A_FEATURE or len(found) == most:
                break
        progress(done + 1, len(order), "features mined for phrases")
        if len(found) == most:
            break
    return list(found.values())


def _shortest(
    rm: RewardModel, sae: Sae, site: str, feature: int, context: Context, pair: Pair, tokens: PairTokens
) -> Phrase | None:
    """The shortest stretch at a context that keeps the firing."""
    ids, empty = tokens.side(context.side), rm.text_ids(pair.prompt, "")
    texts = spans(rm, ids, response_start(rm, ids, empty), context.position)
    if not texts:
        return None
    for text, peak in zip(texts, peaks_alone(rm, sae, site, pair, texts, feature, empty), strict=True):
        if peak >= KEEPS * context.value:
            return Phrase(text, count_tokens(rm, text), site, feature, peak / context.value)
    return None


def blind(rm: RewardModel, pairs: Sequence[Pair], like: Sequence[Phrase], seed: int) -> Iterator[list[Phrase]]:
    """Lists of as many phrases as ``like``, of as many words each, from random places of the fit split's responses."""
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
                if normal(text) and normal(text) not in drawn:
                    drawn[normal(text)] = Phrase(text, count_tokens(rm, text))
                    break
        yield list(drawn.values())


def shuffled(layout: Sequence[str], rng: random.Random) -> list[str]:
    """The words of all phrases in random order, cut into phrases of as many words as before."""
    words = [word for text in layout for word in text.split()]
    rng.shuffle(words)
    lengths = [len(text.split()) for text in layout]
    ends = np.cumsum(lengths)
    return [" ".join(words[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def without_effect(
    means: Mapping[int, tuple[int, float, float]], up: Sequence[int], bound: float, seed: int
) -> Iterator[list[int]]:
    """Lists of features without effect, one for each of ``up`` while they last, alike in responses fired in and in mass.

    ``means`` holds, for each feature that was ablated exactly, (responses in which it fires, mean mass, mean effect
    effect); without effect is |mean effect| <= ``bound``. A list holds none of the lists before.
    """
    size = 1 + max([*means, *up], default=0)
    traits = np.full((size, 2), 1e-9)
    free = np.zeros(size, dtype=bool)
    for j, (fires, mass, ablation) in means.items():
        traits[j] = fires + 1, mass + 1e-9
        free[j] = abs(ablation) <= bound
    used = list(up)
    while True:
        picked = alike(traits, free, up, used, seed).tolist()
        if not picked:
            return
        used += picked
        yield picked
