"""What else the effect of a confirmed feature could be: the flags that need the model to run (METHOD, "Ranking a feature").

``ending``: at least 80 % of |R_j| comes from final punctuation or template tokens, and completions with the same ending
move too: of the other responses that end as one does on whose ending it fires, it fires on the ending of at least half.

``nonspecific``: it moves unrelated completions of the same prompts by at least half as much, the reference study's control
(features that also move off-topic baselines are ignored there). Read here as: under each of the first prompts that the
feature was confirmed on, another prompt's chosen completion takes the response's place, the feature is ablated from it
exactly, and the mean |R_j| over these texts (0 where it is silent) is held against the mean |R_j| over its own responses.
A feature of a topic or a cue is silent there; one of length, endings or mere assistant speech is not. A few prompts do,
and all features meet the same texts on the same prompts.

A dense feature's ablation takes the stream far from where it ever is, so it also gets R_j with f_j := its dataset mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Entries, Response, ablate_entries, at_site, prefill_pair
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae

ENDING, ENDING_SHARE = 0.8, 0.5
NONSPECIFIC = 0.5
UNRELATED_PROMPTS = 8
"""Prompts a feature on which unrelated completions are tried."""


def endings(rm: RewardModel, tokens: Sequence[PairTokens], ids: Sequence[str], pairs: Sequence[int]) -> pl.DataFrame:
    """(pair, side, ending): the text of each response's last run of punctuation, white space and special tokens."""
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
        confirmed: feature, effect, ending (the effect of ablation from the ending alone), a row a response.
        firing: pair, side, feature, ending (the activation on the ending), a row a response in which it fires.
        ends: what :func:`endings` gives for all responses of ``firing``.
    """
    share = confirmed.group_by("feature").agg((pl.col("ending").abs().sum() / pl.col("effect").abs().sum()).alias("share"))
    fires, alike = pl.col("fires").cast(pl.Float64), pl.col("alike").cast(pl.Float64)
    too = (
        firing.filter(pl.col("ending") > 0)
        .join(ends, on=["pair", "side"])
        .group_by("feature", "end")
        .agg(pl.len().alias("fires"))
        .join(ends.group_by("end").agg(pl.len().alias("alike")), on="end")
        .filter(pl.col("alike") > 1)
        .group_by("feature")
        .agg(((fires * (fires - 1) / (alike - 1)).sum() / fires.sum()).alias("too"))
    )
    most = share.filter(pl.col("share") >= ENDING)["feature"]
    return set(most) & set(too.filter(pl.col("too") >= ENDING_SHARE)["feature"])


def first_pairs(asked: pl.DataFrame, most: int = UNRELATED_PROMPTS) -> pl.DataFrame:
    """(feature, pair): the first pairs of each feature in the common order; ``asked`` has feature, pair, order."""
    return (
        asked.group_by("feature", "pair")
        .agg(pl.col("order").min())
        .sort("feature", "order")
        .group_by("feature", maintain_order=True)
        .head(most)
        .select("feature", "pair")
    )


def unrelated(
    rm: RewardModel, pairs: Mapping[int, Pair], prompts: Mapping[str, str], wanted: Sequence[int], seed: int
) -> dict[int, PairTokens]:
    """For each wanted pair its prompt with another prompt's chosen completion, as the side ``chosen``; ``rejected`` is the
    pair's own chosen completion, so that the span begins where the two part.

    The other prompts stand on one ring in random order, and each prompt takes from the next. Left out where nothing on
    the ring fits the PM's context.
    """
    first: dict[str, int] = {}
    for i, pair in pairs.items():
        first.setdefault(prompts[pair.id], i)
    names = sorted(first)
    ring = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    place = {name: k for k, name in enumerate(ring)}
    found: dict[int, PairTokens] = {}
    for i in wanted:
        own = pairs[i]
        start = place[prompts[own.id]]
        for step in range(1, min(len(ring), 8)):
            other = pairs[first[ring[(start + step) % len(ring)]]].chosen
            tokens = rm.tokenize(Pair(own.id, own.prompt, other, own.chosen))
            if rm.fits(tokens) and not torch.equal(tokens.chosen, tokens.rejected):
                found[i] = tokens
                break
    return found


def unrelated_share(confirmed: pl.DataFrame, moved: pl.DataFrame, tried: pl.DataFrame) -> pl.DataFrame:
    """(feature, unrelated): mean |R_j| over unrelated completions over mean |R_j| of its own responses to the same prompts.

    ``tried`` has a row a feature and pair whose prompt got an unrelated completion; ``moved`` the exact ablations there.
    """
    size = pl.col("effect").abs().cast(pl.Float64)
    own = confirmed.join(tried, on=["feature", "pair"], how="semi").group_by("feature").agg(size.mean().alias("own"))
    return (
        tried.group_by("feature")
        .agg(pl.len().alias("texts"))
        .join(own, on="feature")
        .join(moved.group_by("feature").agg(size.sum().alias("sum")), on="feature", how="left")
        .select("feature", (pl.col("sum").fill_null(0.0) / pl.col("texts") / pl.col("own")).alias("unrelated"))
        .with_columns(pl.col("unrelated").fill_nan(None))
    )


def to_mean(
    rm: RewardModel, sae: Sae, response: Response, site: str, features: Sequence[int], f_mean: Float[Tensor, " m"]
) -> Float[Tensor, " features"]:
    """R_j with f_j := its dataset mean on every token of the span, instead of 0."""
    span = response.x.shape[0]
    entries: list[Entries] = []
    for j in features:
        mine = response.active.feature == j
        f = torch.zeros(span)
        f[response.active.token[mine]] = response.active.value[mine]
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
        texts = prefill_pair(rm, tokens[pair], list(saes), list(sides))
        for side, by_site in sides.items():
            for site, features in by_site.items():
                response = at_site(saes[site], texts[side], site, tokens[pair].divergence)
                effects = to_mean(rm, saes[site], response, site, features or [], means[site])
                rows[site] += [(ids[pair], side, j, float(e)) for j, e in zip(features or [], effects, strict=True)]
    schema = {"pair": pl.String, "side": pl.String, "feature": pl.Int32, "effect": pl.Float64}
    return {site: pl.DataFrame(found, schema=schema, orient="row") for site, found in rows.items()}
