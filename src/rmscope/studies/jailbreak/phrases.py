"""Phrases for a jailbreak: mined where reported features fire hardest, or drawn as controls.

A mined phrase is a stretch of whole words that ends where the feature peaks on the fit split. It is the shortest one that,
alone as the response to the same prompt, still brings the feature to :data:`PEAK_SHARE` of that peak. Controls are phrases
drawn blind to features, phrases of features without effect, and the words of the phrases themselves in random order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rmscope.evaluation.selection import match_by_traits
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import SIDES, Pair
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.targets import Layout, Phrase, Placement, count_tokens

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


def normal_form(text: str) -> str:
    """Lower case, letters and digits only: equal for duplicates."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def hardest_firings(inputs: Inputs, site: str, features: Sequence[int]) -> pl.DataFrame:
    """Each feature's :data:`CONTEXTS` hardest firings on stored response tokens, one per response, the hardest first.

    The columns are feature, pair (place in the fit split), region (0 prompt, 1 chosen, 2 rejected), position in the text,
    and value (the activation).
    """
    store, wanted = inputs.store, torch.as_tensor(list(features))
    columns = {name: store.column(site, name) for name in ("pair", "region", "position")}
    firings = []
    for rows in ((columns["region"] > 0) & (columns["position"] > 0)).nonzero().flatten().split(CHUNK):
        active = inputs.saes[site].active(store.rows(site, rows))
        at = torch.isin(active.feature, wanted)
        fires = {"feature": active.feature[at].numpy(), "value": active.value[at].numpy()}
        firings.append(pl.DataFrame(fires | {name: c[rows[active.token[at]]].numpy() for name, c in columns.items()}))
    hardest = pl.concat(firings).sort("value", descending=True, maintain_order=True)
    of_response = hardest.unique(["feature", "pair", "region"], keep="first", maintain_order=True)
    return of_response.group_by("feature", maintain_order=True).head(CONTEXTS)


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


def mine_phrases(
    inputs: Inputs, wanted: Mapping[str, Sequence[int]], most: int, progress: Progress = silent
) -> list[Phrase]:
    """At most ``most`` different phrases of a site's ``wanted`` features (the first come first), the sites in turn."""
    firings = {site: hardest_firings(inputs, site, features) for site, features in wanted.items()}
    turns = max((len(f) for f in wanted.values()), default=0)
    order = [(site, f[turn]) for turn in range(turns) for site, f in wanted.items() if turn < len(f)]
    phrases: dict[str, Phrase] = {}
    for done, (site, j) in enumerate(order):
        full = min(most, len(phrases) + PHRASES_PER_FEATURE)
        for firing in firings[site].filter(pl.col("feature") == j).select("pair", "region", "position", "value").rows():
            phrase = _shortest(inputs, site, j, *firing)
            if phrase is not None:
                phrases.setdefault(normal_form(phrase.text), phrase)
            if len(phrases) == full:
                break
        progress(done + 1, len(order), "features mined for phrases")
        if len(phrases) == most:
            break
    return list(phrases.values())


def _shortest(inputs: Inputs, site: str, feature: int, place: int, region: int, position: int, peak: float) -> Phrase | None:
    """The shortest stretch at a firing that alone keeps it, if there is one."""
    rm, pair = inputs.rm, inputs.pairs[place]
    ids, empty = inputs.tokens[place].side(SIDES[region - 1]), rm.text_ids(pair.prompt, "")
    texts = word_spans(rm, ids, response_start(rm, ids, empty), position)
    for text, alone in zip(texts, _peaks_alone(inputs, site, feature, pair, texts, empty), strict=True):
        if alone >= PEAK_SHARE * peak:
            return Phrase(text, count_tokens(rm, text), site, feature, alone / peak)
    return None


@torch.no_grad()
def _peaks_alone(inputs: Inputs, site: str, feature: int, pair: Pair, texts: Sequence[str], empty: Tensor) -> list[float]:
    """The feature's largest activation in each text as the whole response; ``empty`` is the prompt with an empty one."""
    rm, special = inputs.rm, torch.tensor(inputs.rm.tokenizer.all_special_ids)
    ids = [rm.text_ids(pair.prompt, text) for text in texts]
    peaks = [0.0] * len(texts)
    for batch in rm.text_batches(ids):
        stream = rm.streams(batch, [site])[site]
        for text in batch.texts:
            first = response_start(rm, ids[text.pair], empty)
            x = stream[text.row, text.columns[first:].to(stream.device)].float().cpu()
            f = inputs.saes[site].encode(x)[~torch.isin(ids[text.pair][first:], special), feature]
            peaks[text.pair] = float(f.max()) if f.numel() else 0.0
    return peaks


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


def shuffle_phrases(rm: RewardModel, layout: Layout, seed: str) -> Layout:
    """The words of all phrases in random order, cut into phrases of as many words as before."""
    words = [word for p in layout for word in p.text.split()]
    random.Random(seed).shuffle(words)
    left = iter(words)
    texts = [" ".join(next(left) for _ in p.text.split()) for p in layout]
    return tuple(Placement(t, count_tokens(rm, t), slot=p.slot) for t, p in zip(texts, layout, strict=True))


def phrases_without_effect(inputs: Inputs, up: Mapping[str, Sequence[int]], most: int, seed: int) -> Iterator[list[Phrase]]:
    """Lists of phrases of features without effect, matched to ``up``, while there are such features."""
    draws = {site: features_without_effect(inputs.means[site], js, inputs.bound, seed) for site, js in up.items()}
    while any((features := {site: next(drawn, []) for site, drawn in draws.items()}).values()):
        yield mine_phrases(inputs, features, most)


def features_without_effect(means: pl.DataFrame, up: Sequence[int], bound: float, seed: int) -> Iterator[list[int]]:
    """Lists of features without effect, no feature in two lists, until there are no more.

    Each list has one feature for each of ``up`` (while they last), matched in responses fired in and in mass. A feature is
    without effect where |mean effect| <= ``bound``; ``means`` holds the features that were ablated exactly.
    """
    ablated = means["feature"].to_list()
    size = 1 + max([*ablated, *up], default=0)
    traits, free = np.full((size, 2), 1e-9), np.zeros(size, dtype=bool)
    traits[ablated] = means.select(pl.col("fires") + 1, pl.col("mass") + 1e-9).to_numpy()
    free[ablated] = (means["effect"].abs() <= bound).to_numpy()
    used = list(up)
    while matched := match_by_traits(traits, free, up, used, seed).tolist():
        used += matched
        yield matched
