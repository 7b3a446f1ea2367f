"""Ranking: which features drive reward, proven on prompts that had no part in choosing them.

Fit split: the screen proposes candidates, exact removal on a few responses each freezes at most 200 features of a run
with their sign. Confirm split: exact removal again; zero is the wrong null where noise is nearly nil, so the test is
one-sided against .05 SD(Δr) in the frozen sign, by sign flips per prompt (the same flips for all features), with
Benjamini-Hochberg q over the frozen list (METHOD, "Ranking a feature").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from rmscope.effects.statistics import (
    benjamini_hochberg,
    correlation,
    flip_matrix,
    mean_interval,
    sign_flip_p,
)

BOUND = 0.05
"""The effect a reported feature must exceed, in SD(Δr)."""
ELIGIBLE_PROMPTS = 20
Q = 0.05


def candidates(table: pl.DataFrame, best: int, others: int, seed: int) -> dict[str, list[int]]:
    """The screen: ``best`` features up and down by mean estimate where they fire, and a stratified sample of others.

    ``table`` has the columns prompt, feature, effect (estimated), mass. Only features that fire on at least 20 prompts
    are proposed; the others, for trust and for what the screen misses, may be any active feature.
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

    All features walk through the responses in one order (the column ``order``), so that their removals meet in the same
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


def one_pair_a_prompt(table: pl.DataFrame, features: Sequence[int], prompts: int) -> pl.DataFrame:
    """For each feature one pair of each of at most ``prompts`` prompts: both of its sides where it fires on both."""
    fires = table.filter(pl.col("feature").is_in(list(features)))
    pairs = (
        fires.group_by("feature", "prompt", "pair")
        .agg(pl.col("order").min())
        .sort("feature", "prompt", "order")
        .unique(["feature", "prompt"], keep="first", maintain_order=True)
        .sort("feature", "order")
        .with_columns(pl.int_range(pl.len()).over("feature").alias("place"))
        .filter(pl.col("place") < prompts)
    )
    return fires.join(pairs.select("feature", "pair"), on=["feature", "pair"], how="semi").sort("feature", "order")


def freeze(exact: pl.DataFrame, screened: Sequence[int], most: int) -> pl.DataFrame:
    """The frozen list: feature and sign, by |mean removal| on the fit split."""
    return (
        exact.filter(pl.col("feature").is_in(list(screened)))
        .group_by("feature")
        .agg(pl.col("effect").mean().alias("fit_removal"))
        .sort(pl.col("fit_removal").abs(), "feature", descending=[True, False])
        .head(most)
        .with_columns(pl.col("fit_removal").sign().cast(pl.Int8).alias("sign"))
    )


def confirm(
    frozen: Mapping[str, pl.DataFrame],
    exact: Mapping[str, pl.DataFrame],
    prompts_firing: Mapping[str, Mapping[int, int]],
    sd: float,
    seed: int,
) -> dict[str, pl.DataFrame]:
    """The ranking of each site from exact removals on the confirm split.

    Args:
        frozen: per site, the list of :func:`freeze`.
        exact: per site, columns pair, prompt, side, feature, effect, length_difference (chosen - rejected, tokens).
        prompts_firing: per site, the number of confirm prompts on which each feature fires.
        sd: SD(Δr).

    Returns:
        Per site a row a frozen feature: feature, rank (by |mean removal|, reported first), reported, mean_removal,
        ci_low, ci_high, q, n (prompts measured), mean_diff, sign_consistency, length_corr, eligible, prompts.
        q runs over the frozen lists of all sites together.
    """
    prompts = sorted({p for table in exact.values() for p in table["prompt"].unique().to_list()})
    place = {p: i for i, p in enumerate(prompts)}
    signs = flip_matrix(len(prompts), seed)
    rows: list[dict[str, object]] = []
    for site, list_ in frozen.items():
        by_feature = {int(k[0]): part for k, part in exact[site].group_by("feature")}  # type: ignore[call-overload]
        for feature, sign in list_.select("feature", "sign").iter_rows():
            firing = prompts_firing[site].get(feature, 0)
            row: dict[str, object] = {"site": site, "feature": feature, "sign": sign, "prompts": firing}
            rows.append(row | _confirmed(by_feature.get(feature), int(sign), place, signs, sd))
    if not rows:
        return {site: pl.DataFrame(schema=SCHEMA) for site in frozen}
    q = benjamini_hochberg(np.array([r["p"] for r in rows], dtype=float))
    for r, value in zip(rows, q, strict=True):
        r["q"] = float(value)
        r["eligible"] = int(r["prompts"]) >= ELIGIBLE_PROMPTS  # type: ignore[call-overload]
        r["reported"] = bool(r["eligible"] and value < Q)
    table = pl.DataFrame(rows, infer_schema_length=None)
    return {site: _ranked(table.filter(pl.col("site") == site)) for site in frozen}


SCHEMA = {
    "feature": pl.Int32, "rank": pl.Int32, "reported": pl.Boolean, "mean_removal": pl.Float64, "ci_low": pl.Float64,
    "ci_high": pl.Float64, "q": pl.Float64, "n": pl.Int32, "mean_diff": pl.Float64, "sign_consistency": pl.Float64,
    "length_corr": pl.Float64, "length_bound": pl.Boolean, "eligible": pl.Boolean, "prompts": pl.Int32,
}  # fmt: skip


def _ranked(table: pl.DataFrame) -> pl.DataFrame:
    return (
        table.sort(pl.col("reported"), pl.col("mean_removal").abs(), "feature", descending=[True, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1).alias("rank"))
        .select([pl.col(name).cast(kind) for name, kind in SCHEMA.items()])
    )


def _confirmed(
    part: pl.DataFrame | None, sign: int, place: Mapping[str, int], signs: np.ndarray, sd: float
) -> dict[str, object]:
    """One feature's figures; a feature without a measurement has p = 1."""
    if part is None or part.height == 0:
        nothing = float("nan")
        return {
            "mean_removal": 0.0, "ci_low": nothing, "ci_high": nothing, "p": 1.0, "n": 0, "mean_diff": 0.0,
            "sign_consistency": 0.0, "length_corr": 0.0, "length_bound": False,
        }  # fmt: skip
    by_prompt = part.group_by("prompt").agg(pl.col("effect").mean()).sort("prompt")
    values = by_prompt["effect"].to_numpy().astype(float)
    columns = [place[p] for p in by_prompt["prompt"]]
    low, high = mean_interval(values)
    difference = (
        part.with_columns(pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect")).alias("d"))
        .group_by("pair")
        .agg(pl.col("d").sum(), pl.col("length_difference").first())
        .sort("pair")
    )
    d, length = difference["d"].to_numpy().astype(float), difference["length_difference"].to_numpy().astype(float)
    return {
        "mean_removal": float(values.mean()),
        "ci_low": low,
        "ci_high": high,
        "p": sign_flip_p(sign * values - BOUND * sd, signs[:, columns]),
        "n": values.size,
        "mean_diff": float(d.mean()),
        "sign_consistency": float((np.sign(part["effect"].to_numpy()) == sign).mean()),
        "length_corr": correlation(d, length),
        "length_bound": length_bound(d, length),
    }


def length_bound(d: np.ndarray, length: np.ndarray) -> bool:
    """Whether D_j loses half of its mean once it is regressed on the length difference (the flag ``length``)."""
    if d.size < 5 or length.std() == 0 or d.mean() == 0:
        return False
    slope = np.cov(d, length, bias=True)[0, 1] / length.var()
    return bool(abs(d.mean() - slope * length.mean()) < 0.5 * abs(d.mean()))


ENDING, ENDING_SHARE = 0.8, 0.5
"""A feature is flagged ``ending`` when this share of |R| comes from the endings and it fires on this share of them."""


def ending_features(confirmed: pl.DataFrame, firing: pl.DataFrame, responses: int) -> set[int]:
    """Features that say that the text ended: >= 80 % of |R| comes from final punctuation and template tokens, and they
    fire on the ending of at least half of all ``responses``, so completions with the same ending move too.

    ``confirmed`` has the columns feature, effect, ending (the effect of removal from the ending alone); ``firing`` has
    feature, ending (the activation there), a row a response.
    """
    share = confirmed.group_by("feature").agg((pl.col("ending").abs().sum() / pl.col("effect").abs().sum()).alias("share"))
    often = firing.filter(pl.col("ending") > 0).group_by("feature").len().filter(pl.col("len") >= ENDING_SHARE * responses)
    return set(share.filter(pl.col("share") >= ENDING)["feature"]) & set(often["feature"])


def power(effects_sd: float, prompts: int, sd: float) -> float:
    """The mean removal below which a feature stays invisible: bound plus 2.5 standard errors, in units of reward."""
    return BOUND * sd + 2.5 * effects_sd / max(1, prompts) ** 0.5
