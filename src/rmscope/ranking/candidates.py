"""Which features are screened, on which responses they are ablated, and which are frozen (docs/method.md, Ranking).

Tables have one row per response and feature. Their column ``order`` is one random order of all responses
(:func:`rmscope.effects.tables.with_order`). All features walk through the responses in this order, so that their ablations
meet in the same responses and share batches there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

ELIGIBLE_PROMPTS = 20
"""Only features that fire on at least this many prompts are proposed and reported."""
STRONG = 0.1
"""The share of a feature's prompts on which it fires hardest, if that makes ELIGIBLE_PROMPTS."""
PLACE = pl.int_range(pl.len())
"""A row's place in its group, from 0."""


def candidates(table: pl.DataFrame, best: int, others: int, seed: int) -> dict[str, list[int]]:
    """The screen: ``best`` features up and down by mean estimate where they fire, and a stratified sample of others.

    ``table`` has the columns prompt, feature, effect (estimated), mass. The others measure the quality of the estimate and
    what the screen misses, so they may be any active feature.
    """
    figures = (pl.col("effect", "mass").mean(), pl.col("prompt").n_unique().alias("prompts"))
    by_feature = table.group_by("feature").agg(*figures).sort("feature")
    proposed = by_feature.filter(pl.col("prompts") >= ELIGIBLE_PROMPTS)
    up = proposed.filter(pl.col("effect") > 0).sort("effect", "feature", descending=[True, False])["feature"].head(best)
    down = proposed.filter(pl.col("effect") < 0).sort("effect", "feature")["feature"].head(best)
    rest = by_feature.filter(~pl.col("feature").is_in([*up, *down]))
    return {"up": up.to_list(), "down": down.to_list(), "others": _stratified(rest, others, seed)}


def _stratified(rest: pl.DataFrame, n: int, seed: int) -> list[int]:
    """``n`` features, in equal numbers (while they last) from the quartiles of |mean estimate| by the halves of the mass."""
    if rest.height <= n:
        return rest["feature"].to_list()
    quartile = rest["effect"].abs().rank("ordinal") * 4 // (rest.height + 1)
    half = rest["mass"].rank("ordinal") * 2 // (rest.height + 1)
    place = np.argsort(np.random.default_rng(seed).permutation(rest.height))
    shuffled = rest.select("feature", (quartile * 2 + half).alias("cell"), pl.Series("place", place)).sort("place")
    return shuffled.sort(PLACE.over("cell"), "cell")["feature"].head(n).sort().to_list()


def first_responses(table: pl.DataFrame, features: Sequence[int], limit: int) -> pl.DataFrame:
    """For each feature at most ``limit`` of the responses in which it fires, different prompts first."""
    return (
        table.filter(pl.col("feature").is_in(list(features)))
        .sort("order")
        .with_columns(PLACE.over("feature", "prompt").alias("turn"))
        .sort("feature", "turn", "order")
        .filter(PLACE.over("feature") < limit)
        .drop("turn")
    )


def pairs_a_prompt(table: pl.DataFrame, features: Sequence[int], prompts: int, pairs: int = 1) -> pl.DataFrame:
    """For each feature at most ``pairs`` pairs of each of at most ``prompts`` prompts: both sides where it fires on both."""
    fires = table.filter(pl.col("feature").is_in(list(features)))
    by_pair = fires.group_by("feature", "prompt", "pair").agg(pl.col("order").min()).sort("feature", "prompt", "order")
    by_pair = by_pair.with_columns(PLACE.over("feature", "prompt").alias("turn")).filter(pl.col("turn") < pairs)
    first = by_pair.filter(pl.col("turn") == 0).sort("feature", "order").filter(PLACE.over("feature") < prompts)
    kept = by_pair.join(first, on=["feature", "prompt"], how="semi")
    return fires.join(kept, on=["feature", "pair"], how="semi").sort("feature", "order")


def strongest(table: pl.DataFrame, features: Sequence[int], prompts: int, least: int = ELIGIBLE_PROMPTS) -> pl.DataFrame:
    """For each feature the strongest firing (``strong``) of each of at most ``prompts`` prompts.

    The other side of the same pair is added where the feature fires there too. ``table`` has the columns pair, side,
    prompt, feature, order and effect, which is Σ_t f_tj. The prompts are a random choice of those whose strongest firing is
    among the strongest: :data:`STRONG` of all, and at least ``least``. A feature that fires on fewer prompts is left out.
    """
    n = pl.len().over("feature")
    fires = table.filter(pl.col("feature").is_in(list(features)))
    hardest = (
        fires.sort("feature", "effect", "order", descending=[False, True, False])
        .filter(PLACE.over("feature", "prompt") == 0)
        .filter((n >= least) & (PLACE.over("feature") < pl.max_horizontal(pl.lit(least), STRONG * n)))
        .sort("feature", "order")
        .filter(PLACE.over("feature") < prompts)
        .select("feature", "pair", pl.col("side").alias("hardest"))
    )
    both = fires.join(hardest, on=["feature", "pair"]).with_columns((pl.col("side") == pl.col("hardest")).alias("strong"))
    return both.drop("hardest").sort("feature", "order")


def freeze(exact: pl.DataFrame, screened: Sequence[int], most: int) -> pl.DataFrame:
    """The frozen list (feature, fit_effect, sign), at most ``most`` features by |mean effect| on the fit split."""
    return (
        exact.filter(pl.col("feature").is_in(list(screened)))
        .group_by("feature")
        .agg(pl.col("effect").mean().alias("fit_effect"))
        .sort(pl.col("fit_effect").abs(), "feature", descending=[True, False])
        .head(most)
        .with_columns(pl.col("fit_effect").sign().cast(pl.Int8).alias("sign"))
    )


def preference_signs(effects: pl.DataFrame) -> pl.DataFrame:
    """(feature, sign_diff): the sign of the summed R_j chosen - R_j rejected, from both sides of every pair.

    ``effects`` are estimates as a rule: exact ablations on the fit split cover few responses.
    """
    signed = pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect"))
    return (
        effects.sort("pair", "side", "feature")
        .group_by("feature", maintain_order=True)
        .agg(signed.cast(pl.Float64).sum().sign().cast(pl.Int8).alias("sign_diff"))
    )


def firing_counts(firing: pl.DataFrame, pairs: int) -> pl.DataFrame:
    """(feature, prompts on which it fires, fire_pairs: the share of ``pairs`` in which it fires on at least one side)."""
    counts = (pl.col("prompt").n_unique().alias("prompts"), (pl.col("pair").n_unique() / pairs).alias("fire_pairs"))
    return firing.group_by("feature").agg(*counts)
