"""Which frozen features drive reward and which drive preference, on prompts that had no part in choosing them.

docs/method.md, Ranking, defines both questions. Both are tested one-sided against .05 SD(Δr) in the frozen sign: exact
ablation has nearly no noise, so zero is the wrong null. q is from Benjamini and Hochberg (1995) over the eligible features
of all sites, with one p each.

*Drives reward*: p is from the studentised bootstrap over prompts, since effects are skewed. It is asked twice, of the mean
and of the strongest firings; the smaller p counts, doubled. *Drives preference*: p is from sign flips per prompt, the same
for all features. With labels drawn by coin the sign of every D_j is a coin's, so flips are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

from rmscope.ranking.candidates import ELIGIBLE_PROMPTS
from rmscope.statistics import (
    FEW,
    Array,
    flip_matrix,
    mean_interval,
    partial_correlation,
    q_values_of,
    sign_flip_p,
    studentised_p,
)

BOUND = 0.05
"""The effect a reported feature must exceed, in SD(Δr)."""
Q = 0.05
SCHEMA = {
    "feature": pl.Int32, "rank": pl.Int32, "reported": pl.Boolean, "mean_effect": pl.Float64, "ci_low": pl.Float64,
    "ci_high": pl.Float64, "q": pl.Float64, "n": pl.Int32, "strong_effect": pl.Float64, "strong_low": pl.Float64,
    "strong_high": pl.Float64, "q_strong": pl.Float64, "n_strong": pl.Int32, "strong_consistency": pl.Float64,
    "prefers": pl.Boolean, "mean_diff": pl.Float64, "diff_low": pl.Float64, "diff_high": pl.Float64, "q_diff": pl.Float64,
    "sign_consistency": pl.Float64, "length_corr": pl.Float64, "length_bound": pl.Boolean, "eligible": pl.Boolean,
    "prompts": pl.Int32, "fire_pairs": pl.Float64,
}  # fmt: skip
P_VALUES = ("p", "p_diff", "p_strong")


def confirm(
    frozen: Mapping[str, pl.DataFrame],
    exact: Mapping[str, pl.DataFrame],
    sd: float,
    seed: int,
    bound: float = BOUND,
    strong: Mapping[str, pl.DataFrame] | None = None,
) -> dict[str, pl.DataFrame]:
    """The ranking of each site from exact ablations on the confirm split.

    Args:
        frozen: per site, the list of :func:`~rmscope.ranking.candidates.freeze` with sign_diff, prompts and fire_pairs
            (on the confirm split).
        exact: per site, columns pair, prompt, side, feature, effect, delta (Δr), length_difference (chosen - rejected,
            tokens); both sides of a pair where the feature fires on both.
        sd: SD(Δr).
        strong: per site, columns prompt, feature, effect, strong: exact ablations of
            :func:`~rmscope.ranking.candidates.strongest`.

    Returns:
        Per site one row per frozen feature, with the columns of ``SCHEMA``; rank by |mean effect|, reported first. A
        feature is reported where the smaller of q (of the mean) and q_strong is below .05. Features that are not eligible
        are not tested: their q is 1. Features without enough strong firings of the mean's sign have no q_strong.
        ``length_corr`` is the correlation of D_j with the length difference given Δr: whether the feature goes with length
        among pairs that the PM holds equally far apart.
    """
    strong = strong or {}
    prompts = sorted({p for table in (*exact.values(), *strong.values()) for p in table["prompt"].unique()})
    place = {p: i for i, p in enumerate(prompts)}
    signs = flip_matrix(len(prompts), seed)

    def beyond(values: pl.Series, sign: int) -> Array:
        return sign * values.cast(pl.Float64).to_numpy() - bound * sd

    rows: list[dict[str, Any]] = []
    for site, listed in frozen.items():
        measured = _by_prompt(exact[site]).partition_by("feature", as_dict=True)
        hardest = strong[site].filter("strong").sort("feature", "prompt") if site in strong else None
        firings = {} if hardest is None else hardest.partition_by("feature", as_dict=True)
        for one in listed.iter_rows(named=True):
            row = {"site": site, **one}
            if (part := measured.get((one["feature"],))) is not None:
                row |= _confirmed(part, one)
                row["p"] = studentised_p(beyond(part["ablation"], one["sign"]), seed)
                row["p_diff"] = sign_flip_p(
                    beyond(part["d"], one["sign_diff"]), signs[:, [place[p] for p in part["prompt"]]]
                )
            if (part := firings.get((one["feature"],))) is not None:
                row |= _strong(part, one["sign"])
                row["p_strong"] = studentised_p(beyond(part["effect"], one["sign"]), seed)
            rows.append(row)
    ranked = _ranked(pl.DataFrame(rows, schema=SCHEMA | {"site": pl.String} | dict.fromkeys(P_VALUES, pl.Float64)))
    return {site: ranked.filter(pl.col("site") == site).select(*SCHEMA) for site in frozen}


def _ranked(table: pl.DataFrame) -> pl.DataFrame:
    """Adds q, what is reported and the rank within the site. A feature without a measurement has p = 1 and no effect."""
    table = table.with_columns(
        pl.col("mean_effect", "mean_diff", "sign_consistency", "length_corr", "n", "n_strong").fill_null(0),
        pl.col("ci_low", "ci_high", "diff_low", "diff_high").fill_null(float("nan")),
        pl.col("p", "p_diff").fill_null(1.0),
        pl.col("length_bound").fill_null(False),
    )
    p, p_diff, p_strong = (table[name].to_numpy() for name in P_VALUES)
    eligible = (table["prompts"] >= ELIGIBLE_PROMPTS).fill_null(False).to_numpy()
    asked = ~np.isnan(p_strong) & (table["strong_effect"] * table["mean_effect"] > 0).fill_null(False).to_numpy()
    twice, strong = np.where(asked, 2 * p, p), np.where(asked, 2 * p_strong, 1.0)
    family = np.minimum(1.0, np.minimum(twice, strong)[eligible])
    q, q_strong = (np.where(eligible, q_values_of(np.minimum(1.0, of), family), 1.0) for of in (twice, strong))
    return (
        table.with_columns(
            pl.Series("q", q),
            pl.Series("q_strong", np.where(asked, q_strong, np.nan)).fill_nan(None),
            pl.Series("q_diff", np.where(eligible, q_values_of(p_diff, p_diff[eligible]), 1.0)),
            pl.Series("eligible", eligible),
        )
        .with_columns(
            ((pl.col("q") < Q) | (pl.col("q_strong") < Q).fill_null(False)).alias("reported"),
            (pl.col("q_diff") < Q).alias("prefers"),
        )
        .sort(pl.col("reported"), pl.col("mean_effect").abs(), "feature", descending=[True, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("site").alias("rank"))
    )


def _by_prompt(exact: pl.DataFrame) -> pl.DataFrame:
    """One row per feature and prompt: the mean effect over its responses, the mean D_j over its pairs, signs counted."""
    effect, chosen = pl.col("effect").cast(pl.Float64), pl.col("side") == "chosen"
    pairs = (
        exact.sort("feature", "prompt", "pair", "side")
        .group_by("feature", "prompt", "pair", maintain_order=True)
        .agg(
            effect.sum().alias("total"),
            pl.when(chosen).then(effect).otherwise(-effect).sum().alias("d"),
            (effect > 0).sum().alias("up"),
            (effect < 0).sum().alias("down"),
            pl.len().alias("responses"),
            pl.col("delta", "length_difference").first().cast(pl.Float64),
        )
    )
    return pairs.group_by("feature", "prompt", maintain_order=True).agg(
        (pl.col("total").sum() / pl.col("responses").sum()).alias("ablation"),
        pl.col("up", "down", "responses").sum(),
        pl.col("d", "delta", "length_difference").mean(),
    )


def _confirmed(part: pl.DataFrame, one: Mapping[str, Any]) -> dict[str, Any]:
    """One frozen feature's figures, from one row per prompt."""
    ablation, d, delta, length = (part[c].to_numpy() for c in ("ablation", "d", "delta", "length_difference"))
    low, high = mean_interval(ablation)
    diff_low, diff_high = mean_interval(d)
    return {
        "mean_effect": float(ablation.mean()),
        "ci_low": low,
        "ci_high": high,
        "n": ablation.size,
        "mean_diff": one["fire_pairs"] * float(d.mean()),
        "diff_low": one["fire_pairs"] * diff_low,
        "diff_high": one["fire_pairs"] * diff_high,
        "sign_consistency": int(part["up" if one["sign"] > 0 else "down"].sum()) / int(part["responses"].sum()),
        "length_corr": partial_correlation(d, length, delta),
        "length_bound": length_bound(d, length),
    }


def _strong(part: pl.DataFrame, sign: int) -> dict[str, Any]:
    """One frozen feature's figures where it fires hardest."""
    ablation = part["effect"].cast(pl.Float64).to_numpy()
    low, high = mean_interval(ablation)
    consistency = float((sign * ablation > 0).mean())
    figures = {"strong_effect": float(ablation.mean()), "strong_low": low, "strong_high": high}
    return figures | {"n_strong": ablation.size, "strong_consistency": consistency}


def length_bound(d: Array, length: Array) -> bool:
    """Whether D_j, where it fires, loses half of its mean once regressed on the length difference (the flag ``length``)."""
    if d.size < 5 or length.std() == 0 or d.mean() == 0:
        return False
    slope = np.cov(d, length, bias=True)[0, 1] / length.var()
    return bool(abs(d.mean() - slope * length.mean()) < 0.5 * abs(d.mean()))


def power(spread: float, prompts: int, sd: float, tests: int, hits: int = 1) -> float:
    """The mean effect that is reported four times in five, in units of reward: smaller effects mostly stay invisible.

    ``spread`` is the SD of a feature's effect over prompts, ``prompts`` the number it is measured on, ``hits`` the number
    reported of ``tests`` frozen: the last one of them passes at p = .05 hits / tests. Student's quantile stands for that of
    the studentised bootstrap; inf where there are too few prompts for it.
    """
    if prompts < FEW:
        return float("inf")
    normal = NormalDist()  # scipy.stats takes half a second to import
    z, free = -normal.inv_cdf(Q * max(min(hits, tests), 1) / max(tests, 1)), prompts - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # Abramowitz and Stegun 26.7.5
    return BOUND * sd + (t + normal.inv_cdf(0.8)) * spread / prompts**0.5


def power_statement(ranked: pl.DataFrame, sd: float) -> str:
    """What a site's ranking could see, from its own spread: the median over its measured features."""
    measured = ranked.filter((pl.col("n") > 1) & pl.col("eligible"))
    if not measured.height:
        return f"No feature fires on {ELIGIBLE_PROMPTS} confirm prompts, so none could be reported; give more prompts."
    spread = ((pl.col("ci_high") - pl.col("ci_low")) / 3.92 * pl.col("n").sqrt()).median()
    prompts, typical = int(measured["n"].median()), float(measured.select(spread).item())  # type: ignore[arg-type]
    least = power(typical, prompts, sd, ranked.height, int(ranked["reported"].sum()))
    return (
        f"With {prompts} confirm prompts a feature, mean effect below about {least:.2g} reward are invisible (one of that "
        f"size is reported 4 times in 5; no effect below the bound of {BOUND * sd:.2g} is)."
    )
