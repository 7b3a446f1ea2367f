"""Ranking: which features drive reward and which drive preference, on prompts that had no part in choosing them.

Fit split: the screen proposes candidates, exact ablation on a few responses each freezes at most 200 features of a run
with their signs. Confirm split: exact ablation again; zero is the wrong null where noise is nearly nil, so the test is
one-sided against .05 SD(Δr) in the frozen sign, by sign flips per prompt (the same flips for all features), with
Benjamini-Hochberg q over the frozen list (METHOD, "Ranking a feature").

Two questions, two columns. *Drives reward*: the mean of R_j where it fires (``mean_effect``, ``q``, ``reported``); no
label enters it. *Drives preference*: D_j = R_j chosen - R_j rejected (``mean_diff``, ``q_diff``, ``prefers``), whose sign
is frozen on the fit split from estimates, which cover both sides of every pair. ``mean_diff`` is the mean over all pairs,
those where the feature is silent with their 0; the test asks it of the pairs where the feature fires, against the same
bound. Turn the labels over at random and the sign of every D_j is a coin's: then nothing may be found to drive preference.

What drives reward may do so seldom: a feature that fires weakly nearly everywhere, and hard where a sentence is said twice,
has a small mean. So the first question is also asked where a feature fires hardest: on each prompt's strongest firing, in
the tenth of the prompts where that is strongest, or 20 of them (``strong_effect``, ``q_strong``). Test, sign and bound are
the same; activations choose the responses, never effects. A feature is reported by either test, if both means have one
sign; q runs over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from scipy import stats

from rmscope.statistics import (
    benjamini_hochberg,
    flip_matrix,
    mean_interval,
    partial_correlation,
    sign_flip_p,
)

BOUND = 0.05
"""The effect a reported feature must exceed, in SD(Δr)."""
ELIGIBLE_PROMPTS = 20
Q = 0.05
STRONG = 0.1
"""Of the prompts on which a feature fires, the share on which it fires hardest, if that makes ELIGIBLE_PROMPTS."""


def candidates(table: pl.DataFrame, best: int, others: int, seed: int) -> dict[str, list[int]]:
    """The screen: ``best`` features up and down by mean estimate where they fire, and a stratified sample of others.

    ``table`` has the columns prompt, feature, effect (estimated), mass. Only features that fire on at least 20 prompts
    are proposed; the others, for the quality of the estimate and for what the screen misses, may be any active feature.
    """
    by_feature = (
        table.group_by("feature")
        .agg(pl.col("effect").mean(), pl.col("mass").mean(), pl.col("prompt").n_unique().alias("prompts"))
        .sort("feature")
    )
    proposed = by_feature.filter(pl.col("prompts") >= ELIGIBLE_PROMPTS)
    up = (
        proposed.filter(pl.col("effect") > 0)
        .sort("effect", "feature", descending=[True, False])["feature"]
        .head(best)
        .to_list()
    )
    down = proposed.filter(pl.col("effect") < 0).sort("effect", "feature")["feature"].head(best).to_list()
    rest = by_feature.filter(~pl.col("feature").is_in(up + down))
    return {"up": up, "down": down, "others": _stratified(rest, others, seed)}


def _stratified(rest: pl.DataFrame, n: int, seed: int) -> list[int]:
    """``n`` features, in equal numbers (while they last) from the quartiles of |mean estimate| by the halves of the mass."""
    if rest.height <= n:
        return rest["feature"].to_list()
    cell = (rest["effect"].abs().rank("ordinal") * 4 // (rest.height + 1)) * 2 + rest["mass"].rank("ordinal") * 2 // (
        rest.height + 1
    )
    cells, shuffled = cell.to_numpy(), np.random.default_rng(seed).permutation(rest.height)
    turn = np.empty(rest.height, dtype=int)  # a feature's place within its cell, in random order
    for c in np.unique(cells):
        members = shuffled[cells[shuffled] == c]
        turn[members] = np.arange(members.size)
    return sorted(rest["feature"].to_numpy()[np.lexsort((cells, turn))[:n]].tolist())


def first_responses(table: pl.DataFrame, features: Sequence[int], limit: int) -> pl.DataFrame:
    """For each feature at most ``limit`` of the responses in which it fires, different prompts first.

    All features walk through the responses in one order (the column ``order``), so that their ablations meet in the same
    responses and share batches there.
    """
    return (
        table.filter(pl.col("feature").is_in(list(features)))
        .sort("order")
        .with_columns(pl.int_range(pl.len()).over("feature", "prompt").alias("turn"))
        .sort("feature", "turn", "order")
        .with_columns(pl.int_range(pl.len()).over("feature").alias("place"))
        .filter(pl.col("place") < limit)
        .drop("turn", "place")
    )


def pairs_a_prompt(table: pl.DataFrame, features: Sequence[int], prompts: int, pairs: int = 1) -> pl.DataFrame:
    """For each feature at most ``pairs`` pairs of each of at most ``prompts`` prompts: both sides where it fires on both."""
    fires = table.filter(pl.col("feature").is_in(list(features)))
    turn = pl.int_range(pl.len()).over("feature", "prompt").alias("turn")
    firing = fires.group_by("feature", "prompt", "pair").agg(pl.col("order").min())
    firing = firing.sort("feature", "prompt", "order").with_columns(turn).filter(pl.col("turn") < pairs)
    place = pl.int_range(pl.len()).over("feature").alias("place")
    first = firing.filter(pl.col("turn") == 0).sort("feature", "order").with_columns(place)
    kept = firing.join(first.filter(pl.col("place") < prompts), on=["feature", "prompt"], how="semi")
    return fires.join(kept.select("feature", "pair"), on=["feature", "pair"], how="semi").sort("feature", "order")


def strongest(table: pl.DataFrame, features: Sequence[int], prompts: int, least: int = ELIGIBLE_PROMPTS) -> pl.DataFrame:
    """For each feature the strongest firing (``strong``) of each of at most ``prompts`` prompts, and the other side of the
    same pair where it fires there too.

    ``table`` has the columns pair, side, prompt, feature, order and effect, which is Σ_t f_tj. The prompts are a random
    choice of those whose strongest firing is among the strongest: :data:`STRONG` of all, and at least ``least``. A feature
    that fires on fewer prompts is left out.
    """
    place, n = pl.int_range(pl.len()), pl.len().over("feature")
    fires = table.filter(pl.col("feature").is_in(list(features)))
    hardest = (
        fires.sort("feature", "effect", "order", descending=[False, True, False])
        .filter(place.over("feature", "prompt") == 0)
        .filter((n >= least) & (place.over("feature") < pl.max_horizontal(pl.lit(least), STRONG * n)))
        .sort("feature", "order")
        .filter(place.over("feature") < prompts)
        .select("feature", "pair", pl.col("side").alias("hardest"))
    )
    both = fires.join(hardest, on=["feature", "pair"]).with_columns((pl.col("side") == pl.col("hardest")).alias("strong"))
    return both.drop("hardest").sort("feature", "order")


def freeze(exact: pl.DataFrame, screened: Sequence[int], most: int) -> pl.DataFrame:
    """The frozen list: feature and sign, by |mean effect| on the fit split."""
    return (
        exact.filter(pl.col("feature").is_in(list(screened)))
        .group_by("feature")
        .agg(pl.col("effect").mean().alias("fit_effect"))
        .sort(pl.col("fit_effect").abs(), "feature", descending=[True, False])
        .head(most)
        .with_columns(pl.col("fit_effect").sign().cast(pl.Int8).alias("sign"))
    )


def preference_signs(effects: pl.DataFrame) -> pl.DataFrame:
    """(feature, sign_diff): the sign of the summed R_j chosen - R_j rejected; effects of both sides of every pair, estimates
    as a rule."""
    signed = pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect"))
    return (
        effects.sort("pair", "side", "feature")
        .group_by("feature", maintain_order=True)
        .agg(signed.cast(pl.Float64).sum().sign().cast(pl.Int8).alias("sign_diff"))
    )


def firing_counts(firing: pl.DataFrame, pairs: int) -> pl.DataFrame:
    """(feature, prompts on which it fires, fire_pairs: the share of ``pairs`` where it fires on a side at least)."""
    return firing.group_by("feature").agg(
        pl.col("prompt").n_unique().alias("prompts"), (pl.col("pair").n_unique() / pairs).alias("fire_pairs")
    )


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
        frozen: per site, the list of :func:`freeze` with sign_diff (:func:`preference_signs`), prompts and fire_pairs
            (:func:`firing_counts`, on the confirm split).
        exact: per site, columns pair, prompt, side, feature, effect, delta (Δr), length_difference (chosen - rejected,
            tokens); both sides of a pair where the feature fires on both.
        sd: SD(Δr).
        strong: per site, columns prompt, feature, effect, strong: exact ablations where :func:`strongest` says.

    Returns:
        Per site a row a frozen feature, with the columns of ``SCHEMA``; rank by |mean effect|, reported first. q and
        q_strong run together, q_diff by itself, over the frozen lists of all sites. What has no strong firings on enough
        prompts has null there. ``length_corr`` is the correlation of D_j with the length difference given Δr: whether the
        feature goes with length among pairs that the PM holds equally far apart.
    """
    strong = strong or {}
    prompts = sorted({p for table in (*exact.values(), *strong.values()) for p in table["prompt"].unique().to_list()})
    place = {p: i for i, p in enumerate(prompts)}
    signs = flip_matrix(len(prompts), seed)
    rows: list[dict[str, object]] = []
    for site, list_ in frozen.items():
        measured = _by_feature(_by_prompt(exact[site]))
        hardest = _by_feature(strong[site].filter("strong").sort("feature", "prompt")) if site in strong else {}
        for one in list_.iter_rows(named=True):
            kept = {name: one[name] for name in ("feature", "sign", "prompts", "fire_pairs")}
            found = _confirmed(measured.get(one["feature"]), one, place, signs, bound * sd)
            rows.append(
                {"site": site, **kept, **found, **_strong(hardest.get(one["feature"]), one, place, signs, bound * sd)}
            )
    if not rows:
        return {site: pl.DataFrame(schema=SCHEMA) for site in frozen}
    p, p_strong = (np.array([r[name] for r in rows], dtype=float) for name in ("p", "p_strong"))
    asked = ~np.isnan(p_strong)
    q = benjamini_hochberg(np.r_[p, p_strong[asked]])
    q_strong = np.full(len(rows), np.nan)
    q_strong[asked] = q[len(rows) :]
    table = pl.DataFrame(rows, schema_overrides=SCHEMA, infer_schema_length=None).with_columns(
        pl.Series("q", q[: len(rows)]),
        pl.Series("q_strong", q_strong).fill_nan(None),
        pl.Series("q_diff", benjamini_hochberg(np.array([r["p_diff"] for r in rows], dtype=float))),
        (pl.col("prompts") >= ELIGIBLE_PROMPTS).alias("eligible"),
    )
    one_sign = pl.col("strong_effect") * pl.col("mean_effect") > 0
    table = table.with_columns(
        (pl.col("eligible") & ((pl.col("q") < Q) | ((pl.col("q_strong") < Q) & one_sign).fill_null(False))).alias(
            "reported"
        ),
        (pl.col("eligible") & (pl.col("q_diff") < Q)).alias("prefers"),
    )
    return {site: _ranked(table.filter(pl.col("site") == site)) for site in frozen}


SCHEMA = {
    "feature": pl.Int32, "rank": pl.Int32, "reported": pl.Boolean, "mean_effect": pl.Float64, "ci_low": pl.Float64,
    "ci_high": pl.Float64, "q": pl.Float64, "n": pl.Int32, "strong_effect": pl.Float64, "strong_low": pl.Float64,
    "strong_high": pl.Float64, "q_strong": pl.Float64, "n_strong": pl.Int32, "strong_consistency": pl.Float64,
    "prefers": pl.Boolean, "mean_diff": pl.Float64, "diff_low": pl.Float64, "diff_high": pl.Float64, "q_diff": pl.Float64,
    "sign_consistency": pl.Float64, "length_corr": pl.Float64, "length_bound": pl.Boolean, "eligible": pl.Boolean,
    "prompts": pl.Int32, "fire_pairs": pl.Float64,
}  # fmt: skip


def _ranked(table: pl.DataFrame) -> pl.DataFrame:
    return (
        table.sort(pl.col("reported"), pl.col("mean_effect").abs(), "feature", descending=[True, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1).alias("rank"))
        .select([pl.col(name).cast(kind) for name, kind in SCHEMA.items()])
    )


def _by_feature(table: pl.DataFrame) -> dict[int, pl.DataFrame]:
    return {int(k[0]): part for k, part in table.group_by("feature", maintain_order=True)}  # type: ignore[call-overload]


def _by_prompt(exact: pl.DataFrame) -> pl.DataFrame:
    """A row a feature and prompt: the mean effect over its responses, D_j over its pairs, signs of R_j counted."""
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


def _confirmed(
    part: pl.DataFrame | None, one: Mapping[str, object], place: Mapping[str, int], signs: np.ndarray, bound: float
) -> dict[str, object]:
    """One frozen feature's figures, from one row a prompt; a feature without a measurement has p = 1."""
    nothing = float("nan")
    if part is None:
        return {
            "mean_effect": 0.0, "ci_low": nothing, "ci_high": nothing, "p": 1.0, "n": 0, "mean_diff": 0.0,
            "diff_low": nothing, "diff_high": nothing, "p_diff": 1.0, "sign_consistency": 0.0, "length_corr": 0.0,
            "length_bound": False,
        }  # fmt: skip
    ablation, d, delta, length = (part[c].to_numpy() for c in ("ablation", "d", "delta", "length_difference"))
    flips = signs[:, [place[p] for p in part["prompt"]]]
    sign, sign_diff, share = int(one["sign"]), int(one["sign_diff"]), float(one["fire_pairs"])  # type: ignore[call-overload, arg-type]
    low, high = mean_interval(ablation)
    diff_low, diff_high = mean_interval(d)
    return {
        "mean_effect": float(ablation.mean()),
        "ci_low": low,
        "ci_high": high,
        "p": sign_flip_p(sign * ablation - bound, flips),
        "n": ablation.size,
        "mean_diff": share * float(d.mean()),
        "diff_low": share * diff_low,
        "diff_high": share * diff_high,
        "p_diff": sign_flip_p(sign_diff * d - bound, flips),
        "sign_consistency": int(part["up" if sign > 0 else "down"].sum()) / int(part["responses"].sum()),
        "length_corr": partial_correlation(d, length, delta),
        "length_bound": length_bound(d, length),
    }


def _strong(
    part: pl.DataFrame | None, one: Mapping[str, object], place: Mapping[str, int], signs: np.ndarray, bound: float
) -> dict[str, object]:
    """One frozen feature's figures where it fires hardest; null without a measurement."""
    if part is None:
        names = ("strong_effect", "strong_low", "strong_high", "strong_consistency", "p_strong")
        return dict.fromkeys(names) | {"n_strong": 0}
    ablation, sign = part["effect"].cast(pl.Float64).to_numpy(), int(one["sign"])  # type: ignore[call-overload]
    low, high = mean_interval(ablation)
    return {
        "strong_effect": float(ablation.mean()), "strong_low": low, "strong_high": high, "n_strong": ablation.size,
        "strong_consistency": float((sign * ablation > 0).mean()),
        "p_strong": sign_flip_p(sign * ablation - bound, signs[:, [place[p] for p in part["prompt"]]]),
    }  # fmt: skip


def length_bound(d: np.ndarray, length: np.ndarray) -> bool:
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
    z = float(stats.norm.isf(Q * min(max(hits, 1), tests) / max(tests, 1)))
    if z * z >= prompts:
        return float("inf")
    t = z / (1 - z * z / prompts) ** 0.5
    return BOUND * sd + (t + float(stats.norm.ppf(0.8))) * spread / prompts**0.5


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
