"""Whether a changed text agrees with exact ablation: over features, the mean change of the reward against the mean R_j."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

from rmscope.statistics import RESAMPLES, Array, Figure, correlation

BLIND = 50
"""Reported features whose text is changed, drawn blind."""
FEWEST = 4
"""Fewer features make no correlation."""


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


def measure_agreement(contexts: pl.DataFrame, seed: int = 0) -> Agreement:
    """Correlations, and the share of features with the same sign, from the rows of ``measure_contexts``.

    Intervals resample features and, within them, prompts.
    """
    known = contexts.filter(pl.col("text").is_not_null())
    features, prompts = known["feature"].unique().sort().to_list(), known["prompt"].unique().sort().to_list()
    sums = np.zeros((3, len(features), len(prompts)))
    for j, prompt, text, ablation in known.select("feature", "prompt", "text", "ablation").iter_rows():
        sums[:, features.index(j), prompts.index(prompt)] += (text, ablation, 1.0)
    means = sums[:2].sum(2) / np.maximum(sums[2].sum(1), 1)
    n = len(features)
    if n < FEWEST:
        return Agreement(n, known.height, [], None, None, None)
    rng = np.random.default_rng(seed)
    draws = [_compare(_draw(sums, rng)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0)
    figures = [Figure(v, float(a), float(b), n) for v, a, b in zip(_compare(means), low, high, strict=True)]
    points = [(j, float(text), float(ablation)) for j, text, ablation in zip(features, *means, strict=True)]
    return Agreement(n, known.height, points, *figures)


def agreement_over_sites(contexts: Mapping[str, pl.DataFrame], seed: int = 0) -> Agreement:
    """:func:`measure_agreement` over several sites' rows, on at most :data:`BLIND` of their features, drawn blind."""
    each = [table.with_columns(pl.lit(site).alias("site")) for site, table in contexts.items()]
    key = pl.concat_str("site", "feature", separator=" ").rank("dense")
    table = pl.concat(each).with_columns(key.alias("feature"))
    drawn = np.random.default_rng(seed).permutation(table["feature"].unique().sort().to_numpy())[:BLIND]
    return measure_agreement(table.filter(pl.col("feature").is_in(drawn.tolist())), seed)


def _draw(sums: Float[Array, "three features prompts"], rng: np.random.Generator) -> Float[Array, "two features"]:
    """Mean (text, ablation) of features drawn with replacement, over prompts drawn with replacement."""
    _, n, prompts = sums.shape
    some = sums[:, rng.integers(0, n, n)] @ rng.multinomial(prompts, np.full(prompts, 1 / prompts))
    return np.asarray(some[:2, some[2] > 0] / some[2, some[2] > 0])


def _compare(means: Float[Array, "two features"]) -> tuple[float, float, float]:
    text, ablation = means
    spearman = correlation(stats.rankdata(text), stats.rankdata(ablation))
    return correlation(text, ablation), spearman, float((np.sign(text) == np.sign(ablation)).mean())
