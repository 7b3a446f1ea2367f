"""Where reported features fire: their sentences in the fit split, and what they do on fresh responses.

On each fresh response in which a feature fires, from its first token to the read position:

- ``ablation``: R_j;
- ``ablation_beside``: R_G - R_(G without j), G the firing reported features of the same sign: the effect of ablating j once
  the others are gone. Its difference to R_j is the interaction of j with them;
- ``doubled``: the change of the reward when j is doubled where it fires;
- ``text``: the reward of the response minus its reward with j's peak phrase swapped for neutral words.

Over features, the mean ``text`` is compared with the mean R_j: does changed text agree with exact ablation?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Response, ablate_entries, ablate_groups
from rmscope.effects.completions import Completion, complete
from rmscope.evaluation.selection import Responses
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.planting import FILLERS
from rmscope.run.examples import token_texts
from rmscope.sae.base import Active, Sae
from rmscope.statistics import RESAMPLES, Array, Figure, correlation

SENTENCES, WORDS = 3, 30
"""Sentences tried for each feature; a longer one is cut to this many words around the firing."""
PHRASE = 0.5
"""A phrase is the run of tokens around the peak on which the feature fires with at least this share of it."""
RESPONSES = 16
"""Responses on which a feature is studied, on different prompts while they last."""
BLIND = 50
"""Reported features whose text is changed, drawn blind."""
FEWEST = 4
"""Fewer features make no correlation."""
SCHEMA = {
    "feature": pl.Int32, "pair": pl.String, "side": pl.String, "prompt": pl.String, "ablation": pl.Float64,
    "ablation_beside": pl.Float64, "doubled": pl.Float64, "text": pl.Float64, "phrase": pl.String, "words": pl.String,
}  # fmt: skip
"""The columns of :func:`measure_contexts`."""
Row = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of text with ablation over features. The figures are None where there are too few features."""

    features: int
    responses: int
    points: list[tuple[int, float, float]]
    """(feature, mean change of the reward by the text, mean R_j on the same responses)."""
    pearson: Figure | None
    spearman: Figure | None
    same_sign: Figure | None


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
    rm: RewardModel, sae: Sae, responses: Responses, pairs: list[Pair], tokens: list[PairTokens], features: list[int]
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
    sentences: dict[int, list[str]] = {j: [] for j in features}
    for j, listed in sentences.items():
        for _, i, at_token in sorted(peaks[j], reverse=True):
            pair, ids = int(responses.pair[i]), tokens[int(responses.pair[i])].side(responses.side[i])
            start = response_start(rm, ids, rm.text_ids(pairs[pair].prompt, ""))
            text, places = spelling(rm, ids, start)
            place = places[min(max(0, tokens[pair].divergence + at_token - start), len(places) - 1)]
            sentence = sentence_at(text, min(place + 1, max(0, len(text) - 1)))  # + 1: past the space that opens a token
            if sentence and sentence not in listed:
                listed.append(sentence)
            if len(listed) == SENTENCES:
                break
    return sentences, {j: float(torch.cat(v).quantile(0.95)) if v else 0.0 for j, v in values.items()}


def swap_phrase(text: str, places: Sequence[int], f: Tensor, number: int) -> tuple[str, str, str] | None:
    """(the text with the phrase on which ``f`` [tokens] peaks swapped for as many neutral words, the phrase, the words).

    The words come from the filler sentence ``number``. A phrase without a word is deleted. None where the peak has no text
    (a special token).
    """
    peak = int(f.argmax())
    weak = [-1, *(f < PHRASE * f[peak]).nonzero().flatten().tolist(), len(f)]
    a, b = places[max(k for k in weak if k < peak) + 1], places[min(k for k in weak if k > peak)]
    a = b - len(text[a:b].lstrip())
    if a == b:
        return None
    for word in re.finditer(r"[\w'’]+", text):  # no word is cut
        a = word.start() if word.start() < a < word.end() else a
        b = word.end() if word.start() < b < word.end() else b
    phrase = text[a:b]
    words = neutral_words(len(re.findall(r"[\w'’]+", phrase)), number)
    if phrase[0].isupper():
        words = words[:1].upper() + words[1:]
    return text[:a] + words + text[b:], phrase, words


def neutral_words(n: int, number: int) -> str:
    """The first ``n`` words of the filler sentences, from sentence ``number`` on."""
    first = number % len(FILLERS)
    words = re.findall(r"[a-z']+", " ".join((*FILLERS[first:], *FILLERS[:first])).lower())
    return " ".join(islice(cycle(words), n))


def measure_contexts(
    rm: RewardModel, sae: Sae, site: str, signs: dict[int, int], pairs: list[Pair], seed: int, progress: Progress = silent
) -> pl.DataFrame:
    """One row per feature and response, with the columns of :data:`SCHEMA`, at most :data:`RESPONSES` per feature.

    ``signs`` are the features with the sign of their mean effect. Of the fresh ``pairs``, each prompt's first one comes
    before the second ones. The text is changed for :data:`BLIND` of the features, where their peak has text.
    """
    blind = np.random.default_rng(seed).permutation(list(signs))[:BLIND].tolist()
    seen: Counter[int] = Counter()
    rows: list[Row] = []
    for number, pair in enumerate(pairs):
        texts = [pair.side(side).strip() for side in SIDES]
        for side, text, completion in zip(SIDES, texts, complete(rm, pair.prompt, texts, [site]), strict=True):
            response = completion.at(sae, site)
            firing = [j for j in signs if j in response.active.feature]
            wanted = [j for j in firing if seen[j] < RESPONSES]
            seen.update(wanted)
            for j, effects in _ablations(rm, sae, site, response, signs, firing, wanted).items():
                known: Row = {"feature": j, "pair": pair.id, "side": side, "prompt": pair.prompt_key}
                if j in blind:
                    known |= _change_text(rm, pair, text, completion, response.active, j, seen[j])
                rows.append(known | effects)
        progress(number + 1, len(pairs), f"pairs, {len(rows)} features in their contexts")
        if all(seen[j] >= RESPONSES for j in signs):
            break
    return pl.DataFrame(rows, schema=SCHEMA)


def _ablations(
    rm: RewardModel, sae: Sae, site: str, response: Response, signs: dict[int, int], firing: list[int], wanted: list[int]
) -> dict[int, Row]:
    same_sign = {j: [i for i in firing if signs[i] == signs[j]] for j in wanted}
    whole = {signs[j]: same_sign[j] for j in wanted}
    groups = [*([j] for j in wanted), *([i for i in same_sign[j] if i != j] for j in wanted), *whole.values()]
    n, effects = len(wanted), ablate_groups(rm, sae, response, site, groups).double().tolist()
    together, active = dict(zip(whole, effects[2 * n :], strict=True)), response.active
    masks = [active.feature == j for j in wanted]
    more = ablate_entries(rm, sae, response, site, [(active.token[m], active.feature[m], -active.value[m]) for m in masks])
    return {
        j: {"ablation": effects[i], "ablation_beside": together[signs[j]] - effects[n + i], "doubled": -float(more[i])}
        for i, j in enumerate(wanted)
    }


def _change_text(
    rm: RewardModel, pair: Pair, text: str, completion: Completion, active: Active, feature: int, number: int
) -> Row:
    """The reward of the text minus that with the feature's phrase swapped; empty where there is no such phrase."""
    spelled, places = spelling(rm, completion.ids, completion.start)
    at = active.feature == feature
    f = torch.zeros(active.n_tokens).index_put((active.token[at],), active.value[at])
    swap = swap_phrase(spelled, places, f, number)
    if swap is None or spelled.strip() != text:
        return {}
    swapped, phrase, words = swap
    other = complete(rm, pair.prompt, [text, swapped.strip()], [])[1]
    return {"text": completion.reward - other.reward, "phrase": phrase, "words": words}


def measure_agreement(contexts: pl.DataFrame, seed: int = 0) -> Agreement:
    """Correlations and the share of the same sign over features; intervals resample features and, within them, prompts."""
    known = contexts.filter(pl.col("text").is_not_null())
    features, prompts = known["feature"].unique().sort().to_list(), known["prompt"].unique().sort().to_list()
    sums = np.zeros((3, len(features), len(prompts)))
    for j, prompt, text, ablation in known.select("feature", "prompt", "text", "ablation").iter_rows():
        sums[:, features.index(j), prompts.index(prompt)] += (text, ablation, 1.0)
    means = sums[:2].sum(2) / np.maximum(sums[2].sum(1), 1)
    if (n := len(features)) < FEWEST:
        return Agreement(n, known.height, [], None, None, None)
    rng, draws, shares = np.random.default_rng(seed), [], np.full(len(prompts), 1 / len(prompts))
    for _ in range(RESAMPLES):
        some = sums[:, rng.integers(0, n, n)] @ rng.multinomial(len(prompts), shares)
        draws.append(_compare(some[:2, some[2] > 0] / some[2, some[2] > 0]))
    low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0)
    figures = [Figure(v, float(a), float(b), n) for v, a, b in zip(_compare(means), low, high, strict=True)]
    points = list(zip(features, *means.tolist(), strict=True))
    return Agreement(n, known.height, points, *figures)


def agreement_over_sites(contexts: Mapping[str, pl.DataFrame], seed: int = 0) -> Agreement:
    """:func:`measure_agreement` over several sites' rows, on at most :data:`BLIND` of their features, drawn blind."""
    each = [table.with_columns(pl.lit(site).alias("site")) for site, table in contexts.items()]
    key = pl.concat_str("site", "feature", separator=" ").rank("dense")
    table = pl.concat(each).with_columns(key.alias("feature"))
    drawn = np.random.default_rng(seed).permutation(table["feature"].unique().sort().to_numpy())[:BLIND]
    return measure_agreement(table.filter(pl.col("feature").is_in(drawn.tolist())), seed)


def _compare(means: Float[Array, "two features"]) -> tuple[float, float, float]:
    """Pearson, Spearman, and the share of the same sign, of mean changes (text, ablation)."""
    text, ablation = means
    from scipy.stats import rankdata  # takes half a second

    spearman = correlation(rankdata(text), rankdata(ablation))
    return correlation(text, ablation), spearman, float((np.sign(text) == np.sign(ablation)).mean())
