"""Interactions: what ablating features together does beyond the sum of what ablating each does, exactly.

I_ij = R_ij - R_i - R_j on responses in which both features fire, for the best-ranked features of a site, and
I_G = R_G - Σ R_j for the whole reported group and for its two halves, up and down (METHOD, "Ablation effect"). Of features
that raise reward, I > 0 says that one stands in for the other (redundancy: each alone looks smaller than it is), I < 0
that they need each other; where the reward is linear in the stream, I = 0. Everything is run, nothing estimated, on
pairs of the measure split, which had no part in choosing the features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rmscope.effects.ablation import ablate_groups, ablate_naively, at_site, prefill_pair
from rmscope.io import Progress, silent
from rmscope.model.packing import pad_texts
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

Run = Callable[[Sequence[Sequence[int]]], Tensor]
PAIRS = {
    "feature": pl.Int32, "other": pl.Int32, "n": pl.Int32, "ablation": pl.Float64, "other_ablation": pl.Float64,
    "joint": pl.Float64, "interaction": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64,
}  # fmt: skip
GROUPS = {
    "group": pl.String, "features": pl.Int32, "n": pl.Int32, "sum": pl.Float64, "joint": pl.Float64,
    "interaction": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64,
}  # fmt: skip


def groups_of(ranked: pl.DataFrame) -> dict[str, list[int]]:
    """The reported group of a site's ranking: all of it, what raises reward, what lowers it."""
    reported = ranked.filter(pl.col("reported"))
    return {
        "reported": reported["feature"].to_list(),
        "up": reported.filter(pl.col("mean_effect") > 0)["feature"].to_list(),
        "down": reported.filter(pl.col("mean_effect") < 0)["feature"].to_list(),
    }


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
        A row a pair of features that fire together somewhere, with the columns of ``PAIRS`` (means over the n responses),
        largest |interaction| first; and a row a group, with those of ``GROUPS`` (sum = Σ_j R_j, interaction = joint - sum).
    """
    seen: Counter[tuple[int, int]] = Counter()
    pair_rows: list[tuple[str, int, int, float, float, float]] = []
    group_rows: list[tuple[str, str, float, float]] = []
    for number, (pair, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        for fires, run in _sides(rm, sae, site, pair):
            together = [p for p in combinations([j for j in top if j in fires], 2) if seen[p] < most]
            seen.update(together)
            held = {name: [j for j in group if j in fires] for name, group in groups.items()}
            held = {name: group for name, group in held.items() if group}
            alone = sorted({j for some in (*together, *held.values()) for j in some})
            effects = iter(run([*([j] for j in alone), *together, *held.values()]).double().tolist())
            r = {j: next(effects) for j in alone}
            pair_rows += [(prompt, i, j, r[i], r[j], next(effects)) for i, j in together]
            group_rows += [(prompt, name, sum(r[j] for j in group), next(effects)) for name, group in held.items()]
        progress(number + 1, len(tokens), f"{len(pair_rows)} pairs of features ablated together")
    sizes = {name: len(group) for name, group in groups.items()}
    return _pairs(pair_rows), _groups(group_rows, sizes)


def _sides(rm: RewardModel, sae: Sae, site: str, tokens: PairTokens) -> Iterator[tuple[set[int], Run]]:
    """For each side of a pair the features that fire, and what ablates sets of them."""
    start = tokens.divergence
    texts = prefill_pair(rm, tokens, [site]) if rm.capabilities.resume else {}
    for side in SIDES:
        ids = tokens.side(side)
        if rm.capabilities.resume:
            response = at_site(sae, texts[side], site, start)
            yield set(response.features().tolist()), lambda sets, at=response: ablate_groups(rm, sae, at, site, sets)  # type: ignore[misc]
        else:
            x = rm.streams(pad_texts([(0, side, ids, start, ids.numel() - 1)], 0), [site])[site][0, start:]
            fires = set(torch.unique(sae.active(x.float().cpu()).feature).tolist())
            yield fires, lambda sets, ids=ids: ablate_naively(rm, sae, ids, site, start, sets)  # type: ignore[misc]


def _interval(prompts: pl.Series, values: pl.Series) -> dict[str, float]:
    """The 95 % interval of a mean over responses, resampling prompts; missing where there is one prompt."""
    by_prompt = pl.DataFrame({"p": prompts, "v": values}).group_by("p", maintain_order=True).agg(pl.col("v").mean())
    if by_prompt.height < 2:
        return {"ci_low": float("nan"), "ci_high": float("nan")}
    low, high = mean_interval(by_prompt["v"].to_numpy())
    return {"ci_low": low, "ci_high": high}


def _pairs(rows: Sequence[tuple[str, int, int, float, float, float]]) -> pl.DataFrame:
    schema = ["prompt", "feature", "other", "ablation", "other_ablation", "joint"]
    table = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        (pl.col("joint") - pl.col("ablation") - pl.col("other_ablation")).alias("interaction")
    )
    found = [
        {"feature": i, "other": j, "n": part.height}
        | {c: float(np.mean(part[c].to_numpy())) for c in ("ablation", "other_ablation", "joint", "interaction")}
        | _interval(part["prompt"], part["interaction"])
        for (i, j), part in table.group_by("feature", "other", maintain_order=True)
    ]
    return pl.DataFrame(found, schema=PAIRS).sort(
        pl.col("interaction").abs(), "feature", "other", descending=[True, False, False]
    )


def _groups(rows: Sequence[tuple[str, str, float, float]], sizes: Mapping[str, int]) -> pl.DataFrame:
    table = pl.DataFrame(rows, schema=["prompt", "group", "sum", "joint"], orient="row").with_columns(
        (pl.col("joint") - pl.col("sum")).alias("interaction")
    )
    found = [
        {"group": name, "features": sizes[str(name)], "n": part.height}
        | {c: float(np.mean(part[c].to_numpy())) for c in ("sum", "joint", "interaction")}
        | _interval(part["prompt"], part["interaction"])
        for (name,), part in table.group_by("group", maintain_order=True)
    ]
    return pl.DataFrame(found, schema=GROUPS)
