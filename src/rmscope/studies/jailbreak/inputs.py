"""What a jailbreak is built from, the run's reported features, and what it is measured on, pairs of unseen prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from rmscope.activations.store import ActivationStore
from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair, share_a_prompt
from rmscope.pairs.readers import OnBadRow, load_pairs
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.studies.jailbreak.phrases import FeatureMeans
from rmscope.studies.jailbreak.targets import Exclusions

NO_EFFECT = 0.01
"""A feature is without effect where its mean exact ablation effect on the fit split is within this, in SD(Δr)."""
LEAST_RESPONSES = 8
"""Responses on which that mean must rest."""


@dataclass(frozen=True)
class Inputs:
    """A PM, its SAEs, the fit split with its store, and the run's features."""

    rm: RewardModel
    saes: Mapping[str, Sae]
    store: ActivationStore
    pairs: Sequence[Pair]
    """The pairs of the fit split, in the order of the store."""
    tokens: Sequence[PairTokens]
    reported: Mapping[str, Sequence[int]]
    """Reported features by site, the strongest first, without those of the text's ending."""
    up: Mapping[str, Sequence[int]]
    """Those of them that raise the reward."""
    means: Mapping[str, Mapping[int, FeatureMeans]]
    """Features that were ablated exactly on the fit split, by site."""
    bound: float
    """The largest |mean effect| of a feature without effect, in units of reward."""


def read_inputs(run: Run, site: str | None) -> Inputs:
    """The run's features at one site, or at all of its sites.

    Raises:
        InputError: the run has no SAE at the site or is not finished, its PM cannot be resumed at a site, or no reported
            feature raises the reward.
    """
    sites = [run.check_site(site)] if site else list(run.sites)
    reported, up = {}, {}
    for name in sites:
        features = run.reported(name).filter(~pl.col("flags").list.contains("ending"))
        reported[name] = features["feature"].to_list()
        up[name] = features.filter(pl.col("mean_effect") > 0)["feature"].to_list()
    if not any(up.values()):
        raise InputError(
            f"No reported feature of {run.folder} raises the reward at {', '.join(sites)}, so there is nothing to make a "
            "jailbreak of; use another site or a run with more pairs."
        )
    if not run.rm.capabilities.resume:
        raise InputError(
            f"{run.config.model} cannot be resumed at a site, which this search and its ablations need; use a decoder."
        )
    fit = run.scores.filter(pl.col("split") == "fit").select("pair")
    means = {
        name: exact_means(run.effects(name, "exact").join(fit, on="pair", how="semi"), run.effects(name, "estimated"))
        for name in sites
    }
    places = run.of_split("fit")
    return Inputs(
        rm=run.rm,
        saes={name: run.saes[name] for name in sites},
        store=run.store,
        pairs=[run.pairs[i] for i in places],
        tokens=[run.tokens[i] for i in places],
        reported=reported,
        up=up,
        means=means,
        bound=NO_EFFECT * run.sd,
    )


def exact_means(exact: pl.DataFrame, estimated: pl.DataFrame) -> dict[int, FeatureMeans]:
    """Means of the features with at least :data:`LEAST_RESPONSES` exact ablations.

    Args:
        exact: exact ablations on the fit split: feature, effect.
        estimated: every response in which a feature fires: feature, mass.
    """
    ablated = exact.group_by("feature").agg(pl.col("effect").cast(pl.Float64).mean(), pl.len().alias("n"))
    fired = estimated.group_by("feature").agg(pl.len().alias("fires"), pl.col("mass").cast(pl.Float64).mean())
    rows = ablated.filter(pl.col("n") >= LEAST_RESPONSES).join(fired, on="feature").sort("feature")
    return {j: FeatureMeans(*means) for j, *means in rows.select("feature", "fires", "mass", "effect").rows()}


def measured_pairs(run: Run, data: str | None, on_bad_row: OnBadRow = "error") -> tuple[list[Pair], Exclusions]:
    """The pairs to measure on, and how many were left out.

    Without ``data`` they are those of the run's measure split. Pairs of ``data`` are left out where their prompt key or
    first human turn is also that of a pair of the run, in any split.

    Raises:
        InputError: the data cannot be read, or every pair has a prompt of the run.
    """
    if data is None:
        return [run.pairs[i] for i in run.of_split("measure")], Exclusions()
    given = load_pairs(data, on_bad_row=on_bad_row)
    known = share_a_prompt(given, run.inputs.all_pairs)
    fresh = [pair for pair in given if pair.id not in known]
    if not fresh:
        raise InputError(
            f"All {len(given)} pairs of {data} have prompts of the run in {run.folder}, on which features were chosen and "
            "phrases searched; give pairs with other prompts, or none to measure on the run's measure split."
        )
    return fresh, Exclusions({"pairs with a prompt of the run": len(known)} if known else {})
