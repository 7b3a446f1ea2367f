"""What a jailbreak is built from, the run's reported features, and what it is measured on, pairs of unseen prompts."""

from __future__ import annotations

from collections import Counter
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

NO_EFFECT = 0.01
"""A feature is without effect where its mean exact ablation effect on the fit split is within this, in SD(Δr)."""
LEAST_RESPONSES = 8
"""Responses on which that mean must rest."""


@dataclass(frozen=True)
class Inputs:
    """A PM, its SAEs, the fit split with its store, and the run's features. SAEs and features are by site."""

    rm: RewardModel
    saes: Mapping[str, Sae]
    store: ActivationStore
    pairs: Sequence[Pair]
    """The pairs of the fit split, in the order of the store."""
    tokens: Sequence[PairTokens]
    reported: Mapping[str, Sequence[int]]
    """Reported features, the strongest first, without those of the text's ending."""
    up: Mapping[str, Sequence[int]]
    """Those of them that raise the reward."""
    means: Mapping[str, pl.DataFrame]
    """Features that were ablated exactly on the fit split (:func:`exact_means`)."""
    bound: float
    """The largest |mean effect| of a feature without effect, in units of reward."""


def read_inputs(run: Run, site: str | None) -> Inputs:
    """The run's features at one site, or at all of its sites. InputError where none of them raises the reward."""
    sites = [run.check_site(site)] if site else list(run.sites)
    features = {at: run.reported(at).filter(~pl.col("flags").list.contains("ending")) for at in sites}
    up = {at: table.filter(pl.col("mean_effect") > 0)["feature"].to_list() for at, table in features.items()}
    if not any(up.values()):
        raise InputError(
            f"No reported feature of {run.folder} raises the reward at {', '.join(sites)}, so there is nothing to make a "
            "jailbreak of; use another site or a run with more pairs."
        )
    if not run.rm.capabilities.resume:
        raise InputError(
            f"{run.config.model} cannot be resumed at a site, which this search and its ablations need; use a decoder."
        )
    fit, places = run.scores.filter(pl.col("split") == "fit").select("pair"), run.of_split("fit")
    exact = {at: run.effects(at, "exact").join(fit, on="pair", how="semi") for at in sites}
    return Inputs(
        rm=run.rm,
        saes={at: run.saes[at] for at in sites},
        store=run.store,
        pairs=[run.pairs[i] for i in places],
        tokens=[run.tokens[i] for i in places],
        reported={at: table["feature"].to_list() for at, table in features.items()},
        up=up,
        means={at: exact_means(exact[at], run.effects(at, "estimated")) for at in sites},
        bound=NO_EFFECT * run.sd,
    )


def exact_means(exact: pl.DataFrame, estimated: pl.DataFrame) -> pl.DataFrame:
    """The mean effect of the features with at least :data:`LEAST_RESPONSES` exact ablations, fires (responses), mean mass.

    ``estimated`` has one row per response and feature that fires in it, with its mass Σ_t f_tj |d_j|.
    """
    ablated = exact.group_by("feature").agg(pl.col("effect").cast(pl.Float64).mean(), pl.len().alias("n"))
    fired = estimated.group_by("feature").agg(pl.len().alias("fires"), pl.col("mass").cast(pl.Float64).mean())
    return ablated.filter(pl.col("n") >= LEAST_RESPONSES).join(fired, on="feature").sort("feature")


def measured_pairs(run: Run, data: str | None, on_bad_row: OnBadRow = "error") -> tuple[list[Pair], Counter[str]]:
    """The pairs to measure on, and how many were left out, by reason.

    Without ``data`` they are those of the run's measure split. Pairs of ``data`` are left out where their prompt key or
    first human turn is also that of a pair of the run, in any split. InputError where none is left.
    """
    if data is None:
        return [run.pairs[i] for i in run.of_split("measure")], Counter()
    given = load_pairs(data, on_bad_row=on_bad_row)
    known = share_a_prompt(given, run.inputs.all_pairs)
    fresh = [pair for pair in given if pair.id not in known]
    if not fresh:
        raise InputError(
            f"All {len(given)} pairs of {data} have prompts of the run in {run.folder}, on which features were chosen and "
            "phrases searched; give pairs with other prompts, or none to measure on the run's measure split."
        )
    return fresh, Counter({"pairs with a prompt of the run": len(known)} if known else {})
