"""Reported features on fresh responses in which they fire: ablation alone and beside the others, doubling, and the text.

On each response, from its first token on: R_j; what ablating j does once the other reported features of its sign are
gone (R_G - R_G without j, so that the difference to R_j is the interaction of j with them); what doubling j where it
fires does; and Δr of the text: the response minus the response with j's peak phrase swapped for neutral words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy import stats

from rmscope.effects.ablation import ablate_entries
from rmscope.effects.completions import Completion, ablation_effects, complete
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from rmscope.statistics import RESAMPLES, Array, correlation
from rmscope.studies.sufficiency.firing import spelling, swapped

RESPONSES = 16
"""Responses on which a feature is studied, on different prompts while they last."""
BLIND = 50
"""Reported features whose text is changed, drawn blind."""
ROWS = {
    "feature": pl.Int32, "pair": pl.String, "side": pl.String, "prompt": pl.String, "ablation": pl.Float64,
    "ablation_beside": pl.Float64, "doubled": pl.Float64, "text": pl.Float64, "phrase": pl.String, "words": pl.String,
}  # fmt: skip


def in_context(
    rm: RewardModel,
    sae: Sae,
    site: str,
    signs: Mapping[int, int],
    pairs: Sequence[Pair],
    blind: Sequence[int],
    progress: Progress = silent,
) -> pl.DataFrame:
    """A row a feature and response, with the columns of :data:`ROWS`; null text where a feature is not drawn, or its peak
    has no text. ``signs`` holds the features with the sign of their mean effect; a prompt's first pair comes first."""
    seen: Counter[int] = Counter()
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        texts = {side: pair.side(side).strip() for side in SIDES}
        both = complete(rm, pair.prompt, list(texts.values()), [site])
        for side, completion in zip(SIDES, both, strict=True):
            active = completion.at(sae, site).active
            firing = [j for j in signs if bool((active.feature == j).any())]
            wanted = [j for j in firing if seen[j] < RESPONSES]
            seen.update(wanted)
            key = {"pair": pair.id, "side": side, "prompt": str(pair.meta.get("group", pair.first_human_turn()))}
            found = _ablations(rm, sae, site, completion, signs, firing, wanted)
            for j, figures in found.items():
                swap = _swap(rm, sae, site, pair, completion, texts[side], j, seen[j]) if j in blind else {}
                rows.append({"feature": j, **key, **figures, **swap})
        progress(number + 1, len(pairs), f"pairs, {len(rows)} features in their contexts")
        if all(seen[j] >= RESPONSES for j in signs):
            break
    return pl.DataFrame(rows, schema=ROWS)


def _ablations(
    rm: RewardModel,
    sae: Sae,
    site: str,
    completion: Completion,
    signs: Mapping[int, int],
    firing: Sequence[int],
    wanted: Sequence[int],
) -> dict[int, dict[str, float]]:
    alike = {j: [i for i in firing if signs[i] == signs[j]] for j in wanted}
    whole = {signs[j]: alike[j] for j in wanted}
    groups = [*([j] for j in wanted), *([i for i in alike[j] if i != j] for j in wanted), *whole.values()]
    effects = ablation_effects(rm, sae, site, completion, groups).double().tolist()
    n, together = len(wanted), dict(zip(whole, effects[2 * len(wanted) :], strict=True))
    response = completion.at(sae, site)
    active = response.active
    masks = [active.feature == j for j in wanted]
    more = ablate_entries(rm, sae, response, site, [(active.token[m], active.feature[m], -active.value[m]) for m in masks])
    return {
        j: {"ablation": effects[i], "ablation_beside": together[signs[j]] - effects[n + i], "doubled": -float(more[i])}
        for i, j in enumerate(wanted)
    }


def _swap(
    rm: RewardModel, sae: Sae, site: str, pair: Pair, completion: Completion, text: str, feature: int, number: int
) -> dict[str, Any]:
    """Δr of the text: as it is minus with the feature's phrase swapped; empty where that cannot be told."""
    spelled, places = spelling(rm, completion.ids, completion.start)
    active = completion.at(sae, site).active
    mine = active.feature == feature
    f = torch.zeros(active.n_tokens).index_put((active.token[mine],), active.value[mine])
    change = swapped(spelled, places, f, number)
    if change is None or spelled.strip() != text:
        return {}
    edited, phrase, words = change
    other = complete(rm, pair.prompt, [text, edited.strip()], [])[1]
    return {"text": completion.reward - other.reward, "phrase": phrase, "words": words}


def agreement(table: pl.DataFrame, seed: int = 0) -> dict[str, Any]:
    """Over features: correlation of the text's mean Δr with the mean R_j on the same responses, and same signs.

    Intervals resample features and, within them, prompts.
    """
    known = table.filter(pl.col("text").is_not_null())
    features, prompts = known["feature"].unique().sort().to_list(), known["prompt"].unique().sort().to_list()
    sums = np.zeros((3, len(features), len(prompts)))
    for j, prompt, text, ablation in known.select("feature", "prompt", "text", "ablation").iter_rows():
        sums[:, features.index(j), prompts.index(prompt)] += (text, ablation, 1.0)
    points = sums[:2].sum(2) / np.maximum(sums[2].sum(1), 1)
    names = ("pearson", "spearman", "same_sign")
    if len(features) < 4:
        return {"features": len(features), "responses": known.height, "points": [], **dict.fromkeys(names)}
    rng = np.random.default_rng(seed)
    draws = [_compared(_drawn(sums, rng)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0)
    figures = [{"value": v, "low": float(a), "high": float(b)} for v, a, b in zip(_compared(points), low, high, strict=True)]
    return {
        "features": len(features),
        "responses": known.height,
        "points": [[j, *map(float, point)] for j, point in zip(features, points.T, strict=True)],
        **dict(zip(names, figures, strict=True)),
    }


def pooled(tables: Mapping[str, pl.DataFrame], seed: int = 0) -> dict[str, Any]:
    """:func:`agreement` over several sites' tables, on at most :data:`BLIND` of their features, drawn blind."""
    each = [t.with_columns(pl.lit(site).alias("site")) for site, t in tables.items()]
    key = pl.concat_str("site", "feature", separator=" ").rank("dense")
    table = pl.concat(each).with_columns(key.alias("feature"))
    drawn = np.random.default_rng(seed).permutation(table["feature"].unique().sort().to_numpy())[:BLIND]
    return agreement(table.filter(pl.col("feature").is_in(drawn.tolist())), seed)


def _drawn(sums: Array, rng: np.random.Generator) -> Array:
    """Mean (text, ablation) of features drawn with replacement, over prompts drawn with replacement [2, features]."""
    _, n, prompts = sums.shape
    some = sums[:, rng.integers(0, n, n)] @ rng.multinomial(prompts, np.full(prompts, 1 / prompts))
    return np.asarray(some[:2, some[2] > 0] / some[2, some[2] > 0])


def _compared(points: Array) -> tuple[float, float, float]:
    text, ablation = points
    spearman = correlation(stats.rankdata(text), stats.rankdata(ablation))
    return correlation(text, ablation), spearman, float((np.sign(text) == np.sign(ablation)).mean())
