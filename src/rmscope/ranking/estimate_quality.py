"""The quality of an estimate at a site: how well it tracks exact ablation, on a sample weighted back to all features.

The sample is stratified within each response by |estimate| and by Σ_t f_tj |d_j|. A pooled correlation over the top features
and a uniform sample would flatter the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from rmscope.ranking.candidates import PLACE
from rmscope.statistics import Array, bootstrap, weighted_spearman

STRATA = 4
"""Strata by |estimate| times strata by mass, quartiles each."""
PER_RESPONSE = 48
MINIMUM = 8
"""Fewer sampled features than this give no Spearman of a response."""


@dataclass(frozen=True, slots=True)
class EstimateQuality:
    """How well an estimate tracks exact ablation at a site."""

    spearman_median: float
    """Within-response Spearman, median over responses."""
    spearman_low: float
    spearman_high: float
    """Its 95 % interval, bootstrap by prompt."""
    spearman_p10: float
    """10th percentile over responses."""
    spearman_features: float
    """Spearman of the features' means over responses."""
    sign_agreement: float
    """Share of equal signs where |R| > max(noise floor, .01 SD(Δr))."""
    relative_error: float
    """Median |estimate - R| / (|R| + .01 SD(Δr))."""
    top_missed: float
    """Share of a response's true top k that the estimate's top k misses, k a tenth of the active features."""
    top_missed_high: float
    """Its upper 95 % bound."""
    responses: int
    features: int


def sample(estimate: Array, mass: Array, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(indices, weights) of at most ``n`` of one response's active features, stratified; weights sum to their number."""
    if estimate.size <= n:
        return np.arange(estimate.size), np.ones(estimate.size)
    cell = _quartile(np.abs(estimate)) * STRATA + _quartile(mass)
    cells = np.unique(cell)
    picked, weights = [], []
    for c in cells:
        members = np.flatnonzero(cell == c)
        take = min(members.size, max(1, n // cells.size))
        picked.append(rng.choice(members, take, replace=False))
        weights.append(np.full(take, members.size / take))
    return np.concatenate(picked), np.concatenate(weights)


def _quartile(values: Array) -> Array:
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (ranks * STRATA) // values.size


def quality_sample(estimates: pl.DataFrame, responses: int, seed: int) -> pl.DataFrame:
    """A stratified sample of the active features of ``responses`` responses, different prompts first.

    ``estimates`` has pair, side, prompt, order, effect and mass. ``weight`` is how many features a row stands for.
    """
    keys = estimates.select("pair", "side", "prompt", "order").unique().sort("order")
    keys = keys.sort(PLACE.over("prompt"), "order").head(responses)
    rng = np.random.default_rng(seed)
    parts = []
    for pair, side in keys.select("pair", "side").iter_rows():
        part = estimates.filter((pl.col("pair") == pair) & (pl.col("side") == side))
        picked, weight = sample(part["effect"].to_numpy(), part["mass"].to_numpy(), PER_RESPONSE, rng)
        parts.append(part[picked.tolist()].with_columns(pl.Series("weight", weight, dtype=pl.Float64)))
    return pl.concat(parts).rename({"effect": "estimate"}) if parts else pl.DataFrame()


def estimate_quality(table: pl.DataFrame, sd: float, floor: float) -> EstimateQuality:
    """EstimateQuality from a table with the columns response, prompt, feature, estimate, effect (exact), weight.

    ``sd`` is SD(Δr), ``floor`` the noise floor τ; exact effects below it count as 0.
    """
    table = table.with_columns(pl.when(pl.col("effect").abs() < floor).then(0.0).otherwise("effect").alias("effect"))
    parts = [part for part in table.partition_by("response") if part.height >= MINIMUM]
    if not parts:
        nan = float("nan")
        return EstimateQuality(nan, nan, nan, nan, nan, nan, nan, nan, nan, 0, table.height)
    prompts = np.array([part["prompt"][0] for part in parts])
    spearman = np.array([weighted_spearman(*_arrays(part)) for part in parts])
    missed = np.array([_missed(*_arrays(part)) for part in parts])
    low, high = bootstrap(spearman, prompts, lambda v: float(np.nanmedian(v)))
    _, missed_high = bootstrap(missed, prompts, lambda v: float(np.nanmean(v)))
    by_feature = table.group_by("feature", maintain_order=True)
    means = by_feature.agg(pl.col("estimate", "effect").mean(), pl.col("weight").sum())
    estimate, effect, weight = _arrays(table)
    large = np.abs(effect) > max(floor, 0.01 * sd)
    agree = (np.sign(estimate) == np.sign(effect))[large]
    error = np.abs(estimate - effect) / (np.abs(effect) + 0.01 * sd)
    order = np.argsort(error)
    middle = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
    return EstimateQuality(
        spearman_median=float(np.nanmedian(spearman)),
        spearman_low=low,
        spearman_high=high,
        spearman_p10=float(np.nanpercentile(spearman, 10)),
        spearman_features=weighted_spearman(*_arrays(means)),
        sign_agreement=float(np.average(agree, weights=weight[large])) if agree.size else float("nan"),
        relative_error=float(error[order][middle]),
        top_missed=float(np.nanmean(missed)),
        top_missed_high=missed_high,
        responses=len(parts),
        features=table.height,
    )


def _arrays(table: pl.DataFrame) -> tuple[Array, Array, Array]:
    return table["estimate"].to_numpy(), table["effect"].to_numpy(), table["weight"].to_numpy()


def _missed(estimate: Array, effect: Array, weight: Array) -> float:
    """Weighted share of the tenth of the features with the largest |effect| that is not in that of the estimate."""
    top = np.zeros((2, weight.size), dtype=bool)
    for inside, values in zip(top, (effect, estimate), strict=True):
        order = np.argsort(-np.abs(values), kind="stable")
        inside[order] = np.cumsum(weight[order]) - weight[order] < max(1.0, weight.sum() / 10)
    return float(np.average(~top[1, top[0]], weights=weight[top[0]]))
