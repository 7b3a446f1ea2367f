"""The quality of an estimate at a site: how well it tracks exact ablation, on a sample weighted back to all features.

The sample is stratified, a response at a time, by |estimate| and by Σ_t f_tj |d_j|: a pooled correlation over the top
and a uniform sample would flatter (METHOD, "Estimated ablation effect").
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from rmscope.statistics import bootstrap, weighted_spearman

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

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def sample(estimate: np.ndarray, mass: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(indices, weights) of at most ``n`` of one response's active features, stratified; weights sum to their number."""
    total = estimate.size
    if total <= n:
        return np.arange(total), np.ones(total)
    cell = _quantile_bin(np.abs(estimate)) * STRATA + _quantile_bin(mass)
    cells = np.unique(cell)
    picked, weights = [], []
    for c in cells:
        members = np.flatnonzero(cell == c)
        take = min(members.size, max(1, n // cells.size))
        picked.append(rng.choice(members, take, replace=False))
        weights.append(np.full(take, members.size / take))
    return np.concatenate(picked), np.concatenate(weights)


def _quantile_bin(values: np.ndarray) -> np.ndarray:
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (ranks * STRATA) // values.size


def quality_sample(estimates: pl.DataFrame, responses: int, seed: int) -> pl.DataFrame:
    """A stratified sample of the active features of ``responses`` responses, one a prompt while prompts last.

    ``estimates`` carries prompt and order (see :func:`with_order`). Adds ``weight``: how many features a row stands for.
    """
    keys = (
        estimates.select("pair", "side", "prompt", "order")
        .unique()
        .sort("order")
        .with_columns(pl.int_range(pl.len()).over("prompt").alias("turn"))
        .sort("turn", "order")
        .head(responses)
    )
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
    table = table.with_columns(pl.when(pl.col("effect").abs() < floor).then(0.0).otherwise(pl.col("effect")).alias("effect"))
    rows = [_response(part, sd) for _, part in table.group_by("response", maintain_order=True) if part.height >= MINIMUM]
    if not rows:
        nan = float("nan")
        return EstimateQuality(nan, nan, nan, nan, nan, nan, nan, nan, nan, 0, table.height)
    values = np.array([(r["spearman"], r["missed"]) for r in rows])
    prompts = np.array([r["prompt"] for r in rows])
    low, high = bootstrap(values, prompts, lambda v: float(np.nanmedian(v[:, 0])))
    _, missed_high = bootstrap(values, prompts, lambda v: float(np.nanmean(v[:, 1])))
    means = table.group_by("feature", maintain_order=True).agg(
        pl.col("estimate").mean(), pl.col("effect").mean(), pl.col("weight").sum()
    )
    estimate, effect, weight = (table[c].to_numpy() for c in ("estimate", "effect", "weight"))
    large = np.abs(effect) > max(floor, 0.01 * sd)
    error = np.abs(estimate - effect) / (np.abs(effect) + 0.01 * sd)
    return EstimateQuality(
        spearman_median=float(np.nanmedian(values[:, 0])),
        spearman_low=low,
        spearman_high=high,
        spearman_p10=float(np.nanpercentile(values[:, 0], 10)),
        spearman_features=weighted_spearman(*(means[c].to_numpy() for c in ("estimate", "effect", "weight"))),
        sign_agreement=_share(np.sign(estimate[large]) == np.sign(effect[large]), weight[large]),
        relative_error=_weighted_median(error, weight),
        top_missed=float(np.nanmean(values[:, 1])),
        top_missed_high=missed_high,
        responses=len(rows),
        features=table.height,
    )


def _response(part: pl.DataFrame, sd: float) -> dict[str, float | str]:
    estimate, effect, weight = (part[c].to_numpy() for c in ("estimate", "effect", "weight"))
    k = max(1.0, weight.sum() / 10)
    return {
        "prompt": part["prompt"][0],
        "spearman": weighted_spearman(estimate, effect, weight),
        "missed": _missed(np.abs(estimate), np.abs(effect), weight, k),
    }


def _missed(estimate: np.ndarray, effect: np.ndarray, weight: np.ndarray, k: float) -> float:
    """Weighted share of the true top k that is not in the estimated top k."""
    true_top, estimated_top = _top(effect, weight, k), _top(estimate, weight, k)
    return _share(~estimated_top[true_top], weight[true_top])


def _top(values: np.ndarray, weight: np.ndarray, k: float) -> np.ndarray:
    order = np.argsort(-values, kind="stable")
    inside = np.zeros(values.size, dtype=bool)
    inside[order] = np.cumsum(weight[order]) - weight[order] < k
    return inside


def _share(hits: np.ndarray, weight: np.ndarray) -> float:
    return float((hits * weight).sum() / weight.sum()) if weight.size else float("nan")


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)])
