"""Interactions: what ablating features together does beyond the sum of their single ablations, exactly.

I_ij = R_ij - R_i - R_j on responses in which both features fire, for the best-ranked features of a site. I_G = R_G - Σ R_j
for all reported features, for those that raise reward and for those that lower it. Of two features that raise reward, I > 0
means that one makes up for the other (redundancy: each alone looks smaller than it is); I < 0 means that they need each
other. Where the reward is linear in the stream, I = 0. Everything is run, on pairs of the measure split, which had no part
in the choice of features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import mean_interval

TOP = 30
"""Features of a site whose pairs are ablated together."""
PROMPTS = 48
"""Measure prompts, one pair each, on which joint ablations are run."""
PER_PAIR = 12
"""Responses for each pair of features: 30 features that all fire together then cost 5,220 joint ablations, not 41,760."""

PAIRS = {
    "feature": pl.Int32, "other": pl.Int32, "n": pl.Int32, "ablation": pl.Float64, "other_ablation": pl.Float64,
    "joint": pl.Float64, "interaction": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64,
}  # fmt: skip
GROUPS = {
    "group": pl.String, "features": pl.Int32, "n": pl.Int32, "sum": pl.Float64, "joint": pl.Float64,
    "interaction": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64,
}  # fmt: skip


def groups_of(ranked: pl.DataFrame) -> dict[str, list[int]]:
    """The reported features of a site's ranking: all of them, those that raise reward, those that lower it."""
    reported = ranked.filter("reported")
    up, down = (reported.filter(sign * pl.col("mean_effect") > 0) for sign in (1, -1))
    return {name: rows["feature"].to_list() for name, rows in (("reported", reported), ("up", up), ("down", down))}


def interactions(
    rm: RewardModel,
    sae: Sae,
    site: str,
    tokens: Sequence[PairTokens],
    prompts: Sequence[str],
    top: Sequence[int],
    groups: Mapping[str, Sequence[int]],
    most: int = PER_PAIR,
    progress: Progress = silent,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Joint ablations on both sides of the given pairs.

    Args:
        tokens: the pairs, with the prompt of each in ``prompts``; intervals resample prompts.
        top: features whose pairs are ablated, on at most ``most`` responses each, in the order of ``tokens``.
        groups: sets of features that are ablated whole, wherever one of them fires.

    Returns:
        One row per pair of features that fire together somewhere, with the columns of ``PAIRS`` (means over n responses),
        largest |interaction| first. One row per group with the columns of ``GROUPS`` (sum = Σ_j R_j, interaction = joint -
        sum).
    """
    seen: Counter[tuple[int, int]] = Counter()
    pair_rows: list[dict[str, Any]] = []
    group_rows: list[dict[str, Any]] = []
    for number, (pair, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        texts = clean_runs(rm, pair, [site])
        for side in SIDES:
            response = at_site(sae, texts[side], site, pair.divergence)
            fires = set(response.features().tolist())
            together = [p for p in combinations([j for j in top if j in fires], 2) if seen[p] < most]
            seen.update(together)
            firing = {name: [j for j in group if j in fires] for name, group in groups.items()}
            firing = {name: group for name, group in firing.items() if group}
            alone = sorted({j for some in (*together, *firing.values()) for j in some})
            sets = [*([j] for j in alone), *together, *firing.values()]
            effects = iter(ablate_groups(rm, sae, response, site, sets).double().tolist())
            r = {j: next(effects) for j in alone}
            for i, j in together:
                row = {"feature": i, "other": j, "ablation": r[i], "other_ablation": r[j], "joint": next(effects)}
                pair_rows.append({"prompt": prompt, **row, "interaction": row["joint"] - r[i] - r[j]})
            for name, group in firing.items():
                total, joint = sum(r[j] for j in group), next(effects)
                row = {"group": name, "features": len(groups[name]), "sum": total, "joint": joint}
                group_rows.append({"prompt": prompt, **row, "interaction": joint - total})
        progress(number + 1, len(tokens), f"{len(pair_rows)} pairs of features ablated together")
    pairs = _means(pair_rows, ["feature", "other"], PAIRS)
    order = [pl.col("interaction").abs(), pl.col("feature"), pl.col("other")]
    return pairs.sort(order, descending=[True, False, False]), _means(group_rows, ["group", "features"], GROUPS)


def _means(rows: Sequence[dict[str, Any]], keys: list[str], schema: Mapping[str, Any]) -> pl.DataFrame:
    """Means over responses, one row per distinct ``keys``. The 95 % interval of the interaction resamples prompts."""
    means = []
    for key, part in pl.DataFrame(rows).group_by(keys, maintain_order=True) if rows else ():
        by_prompt = part.group_by("prompt", maintain_order=True).agg(pl.col("interaction").mean())["interaction"]
        low, high = mean_interval(by_prompt.to_numpy()) if len(by_prompt) > 1 else (float("nan"), float("nan"))
        values = {c: float(np.mean(part[c].to_numpy())) for c in part.columns if c not in ("prompt", *keys)}
        means.append({**dict(zip(keys, key, strict=True)), "n": part.height, **values, "ci_low": low, "ci_high": high})
    return pl.DataFrame(means, schema=schema)
