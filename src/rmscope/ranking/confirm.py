"""Which frozen features drive reward and which drive preference, on prompts that had no part in choosing them.

docs/method.md, Ranking, defines both questions. Both have the same test: one-sided against .05 SD(Δr) in the frozen sign,
since exact ablation has nearly no noise and zero is the wrong null. p is from sign flips per prompt (the same flips for all
features), q from Benjamini and Hochberg (1995) over the frozen lists of all sites. No label enters *drives reward*. With
labels drawn by coin the sign of every D_j is a coin's, and nothing may be found to *drive preference*.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

from rmscope.ranking.candidates import ELIGIBLE_PROMPTS
from rmscope.statistics import Array, benjamini_hochberg, flip_matrix, mean_interval, partial_correlation, sign_flip_p

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
        Per site one row per frozen feature, with the columns of ``SCHEMA``; rank by |mean effect|, reported first. q and
        q_strong run together, q_diff by itself. Features without enough strong firings have null there. ``length_corr`` is
        the correlation of D_j with the length difference given Δr: whether the feature goes with length among pairs that
        the PM holds equally far apart.
    """
    strong = strong or {}
    prompts = sorted({p for table in (*exact.values(), *strong.values()) for p in table["prompt"].unique()})
    place = {p: i for i, p in enumerate(prompts)}
    signs = flip_matrix(len(prompts), seed)

    def test(values: pl.Series, sign: int, of: pl.Series) -> float:
        return sign_flip_p(sign * values.cast(pl.Float64).to_numpy() - bound * sd, signs[:, [place[p] for p in of]])

    rows: list[dict[str, Any]] = []
    for site, listed in frozen.items():
        measured = _by_prompt(exact[site]).partition_by("feature", as_dict=True)
        hardest = strong[site].filter("strong").sort("feature", "prompt") if site in strong else None
        firings = {} if hardest is None else hardest.partition_by("feature", as_dict=True)
        for one in listed.iter_rows(named=True):
            row = {"site": site, **one}
            if (part := measured.get((one["feature"],))) is not None:
                row |= _confirmed(part, one)
                row["p"] = test(part["ablation"], one["sign"], part["prompt"])
                row["p_diff"] = test(part["d"], one["sign_diff"], part["prompt"])
            if (part := firings.get((one["feature"],))) is not None:
                row |= _strong(part, one["sign"])
                row["p_strong"] = test(part["effect"], one["sign"], part["prompt"])
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
    p, p_diff, q_strong = (table[name].to_numpy(writable=True) for name in P_VALUES)
    asked = ~np.isnan(q_strong)
    q = benjamini_hochberg(np.r_[p, q_strong[asked]])
    q_strong[asked] = q[p.size :]
    by_strong = (pl.col("q_strong") < Q) & (pl.col("strong_effect") * pl.col("mean_effect") > 0)
    eligible = pl.col("prompts") >= ELIGIBLE_PROMPTS
    return (
        table.with_columns(
            pl.Series("q", q[: p.size]),
            pl.Series("q_strong", q_strong).fill_nan(None),
            pl.Series("q_diff", benjamini_hochberg(p_diff)),
            eligible.alias("eligible"),
        )
        .with_columns(
            (eligible & ((pl.col("q") < Q) | by_strong.fill_null(False))).alias("reported"),
            (eligible & (pl.col("q_diff") < Q)).alias("prefers"),
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
    reported of ``tests`` frozen: the last one of them passes at p = .05 hits / tests. Sign flips keep Σ v², so their normal
    deviate z is t / sqrt(1 + t² / n); inf where no effect can pass with so few prompts.
    """
    normal = NormalDist()  # scipy.stats takes half a second to import
    z = -normal.inv_cdf(Q * max(min(hits, tests), 1) / max(tests, 1))
    if z * z >= prompts:
        return float("inf")
    t = z / (1 - z * z / prompts) ** 0.5
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
