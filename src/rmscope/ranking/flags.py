"""What else could explain a confirmed feature: the flags that need the model to run (docs/method.md, Flags).

``ending``: at least 80 % of |R_j| comes from final punctuation or template tokens, and the feature is about that ending: of
the other responses with the same ending as one on whose ending it fires, it fires on the ending of at least half.

``nonspecific``: it moves unrelated completions of the same prompts by at least half as much, a control of Riggs and
Brinkmann (2024). On the first prompts that the feature was confirmed on, another prompt's chosen completion replaces the
response, and the mean |R_j| there (0 where it is silent) is compared with that over its own responses. A feature of a topic
or a cue is silent there; one of length or endings is not. All features meet the same texts on the same prompts.

Ablating a dense feature takes the stream far from where it ever is, so its R_j with f_j := its dataset mean is measured too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Entries, Response, ablate_entries, at_site, clean_runs
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae

ENDING, ENDING_SHARE = 0.8, 0.5
NONSPECIFIC = 0.5
UNRELATED_PROMPTS = 8
"""Prompts per feature on which unrelated completions are tried."""


def endings(rm: RewardModel, tokens: Sequence[PairTokens], ids: Sequence[str], pairs: Sequence[int]) -> pl.DataFrame:
    """(pair, side, end): the text of each response's last run of punctuation, white space and special tokens."""
    rows = []
    for i in pairs:
        for side in SIDES:
            text = tokens[i].side(side)
            text = text[: rm.read_position(text) + 1]
            rows.append((ids[i], side, rm.tokenizer.decode(text[max(rm.ending(text), tokens[i].divergence) :])))
    return pl.DataFrame(rows, schema={"pair": pl.String, "side": pl.String, "end": pl.String}, orient="row")


def ending_features(confirmed: pl.DataFrame, firing: pl.DataFrame, ends: pl.DataFrame) -> set[int]:
    """The features with the flag ``ending``.

    Args:
        confirmed: one row per response: feature, effect, ending (the effect of ablation from the ending alone).
        firing: one row per response in which the feature fires: pair, side, feature, ending (its activation on the ending).
        ends: the table of :func:`endings` for all responses of ``firing``.
    """
    share = (pl.col("ending").abs().sum() / pl.col("effect").abs().sum()).alias("share")
    fires, same = pl.col("fires").cast(pl.Float64), pl.col("same").cast(pl.Float64)
    others = (
        firing.filter(pl.col("ending") > 0)
        .join(ends, on=["pair", "side"])
        .group_by("feature", "end")
        .agg(pl.len().alias("fires"))
        .join(ends.group_by("end").agg(pl.len().alias("same")), on="end")
        .filter(pl.col("same") > 1)
        .group_by("feature")
        .agg(((fires * (fires - 1) / (same - 1)).sum() / fires.sum()).alias("share"))
    )
    mostly = confirmed.group_by("feature").agg(share).filter(pl.col("share") >= ENDING)
    return set(mostly["feature"]) & set(others.filter(pl.col("share") >= ENDING_SHARE)["feature"])


def first_pairs(asked: pl.DataFrame, most: int = UNRELATED_PROMPTS) -> pl.DataFrame:
    """(feature, pair): the first pairs of each feature in the common order; ``asked`` has feature, pair, order."""
    by_pair = asked.group_by("feature", "pair").agg(pl.col("order").min()).sort("feature", "order")
    return by_pair.group_by("feature", maintain_order=True).head(most).select("feature", "pair")


def unrelated(
    rm: RewardModel, pairs: Mapping[int, Pair], prompts: Mapping[str, str], wanted: Sequence[int], seed: int
) -> dict[int, PairTokens]:
    """Each wanted pair's prompt with another prompt's chosen completion, as the side ``chosen``.

    ``rejected`` is the pair's own chosen completion, so that the span begins where the two part. The prompts are on one ring
    in random order, and each takes the next prompt's completion. Pairs are left out where nothing on the ring fits the PM's
    context.
    """
    first = {prompts[pair.id]: i for i, pair in reversed(list(pairs.items()))}
    names = sorted(first)
    ring = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    swapped: dict[int, PairTokens] = {}
    for i in wanted:
        own, start = pairs[i], ring.index(prompts[pairs[i].id])
        for step in range(1, min(len(ring), 8)):
            other = pairs[first[ring[(start + step) % len(ring)]]].chosen
            tokens = rm.tokenize(Pair(own.id, own.prompt, other, own.chosen))
            if rm.fits(tokens) and not torch.equal(tokens.chosen, tokens.rejected):
                swapped[i] = tokens
                break
    return swapped


def unrelated_share(confirmed: pl.DataFrame, moved: pl.DataFrame, tried: pl.DataFrame) -> pl.DataFrame:
    """(feature, unrelated): mean |R_j| over unrelated completions over mean |R_j| of its own responses to the same prompts.

    ``tried`` has one row per feature and pair whose prompt got an unrelated completion; ``moved`` the exact ablations there.
    """
    size = pl.col("effect").abs().cast(pl.Float64)
    own = confirmed.join(tried, on=["feature", "pair"], how="semi").group_by("feature").agg(size.mean().alias("own"))
    share = pl.col("sum").fill_null(0.0) / pl.col("texts") / pl.col("own")
    return (
        tried.group_by("feature")
        .agg(pl.len().alias("texts"))
        .join(own, on="feature")
        .join(moved.group_by("feature").agg(size.sum().alias("sum")), on="feature", how="left")
        .select("feature", share.fill_nan(None).alias("unrelated"))
    )


def to_mean(
    rm: RewardModel, sae: Sae, response: Response, site: str, features: Sequence[int], f_mean: Float[Tensor, " m"]
) -> Float[Tensor, " features"]:
    """R_j with f_j := its dataset mean on every token of the span, instead of 0."""
    span = response.x.shape[0]
    entries: list[Entries] = []
    for j in features:
        fires = response.active.feature == j
        f = torch.zeros(span)
        f[response.active.token[fires]] = response.active.value[fires]
        entries.append((torch.arange(span), torch.full((span,), j), f - f_mean[j]))
    return ablate_entries(rm, sae, response, site, entries)


def mean_table(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    means: Mapping[str, Tensor],
    tokens: Sequence[PairTokens],
    ids: Sequence[str],
    wanted: Mapping[int, Mapping[str, Mapping[str, Sequence[int] | None]]],
) -> dict[str, pl.DataFrame]:
    """Per site (pair, side, feature, effect): R_j with f_j := its mean, for ``wanted[pair][side][site]`` = features.

    Empty for PMs that cannot be resumed at a site (encoders).
    """
    rows: dict[str, list[tuple[str, str, int, float]]] = {site: [] for site in saes}
    for pair, sides in wanted.items() if rm.capabilities.resume else ():
        texts = clean_runs(rm, tokens[pair], list(saes), list(sides))
        for side, by_site in sides.items():
            for site, features in by_site.items():
                response = at_site(saes[site], texts[side], site, tokens[pair].divergence)
                effects = to_mean(rm, saes[site], response, site, features or [], means[site])
                rows[site] += [(ids[pair], side, j, float(e)) for j, e in zip(features or [], effects, strict=True)]
    schema = {"pair": pl.String, "side": pl.String, "feature": pl.Int32, "effect": pl.Float64}
    return {site: pl.DataFrame(listed, schema=schema, orient="row") for site, listed in rows.items()}
