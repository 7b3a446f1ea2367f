"""The effects rooms as plain functions of a PM, an SAE and pairs: what a notebook calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import polars as pl
import torch

from rmscope.effects import tables
from rmscope.effects.gradients import METHODS
from rmscope.effects.ledger import Baseline, baseline, joint_baseline, ledger_rows
from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.checks import Preflight
from rmscope.model.doctor import examine
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.scores import Scores
from rmscope.model.site_names import is_difference
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import SIDES, Pair, one_per_prompt, split_of
from rmscope.ranking.candidates import firing_counts, freeze, preference_signs
from rmscope.ranking.confirm import confirm
from rmscope.run.plan.plan import price
from rmscope.sae.base import Sae
from rmscope.sae.joint import JointSae

Features = Sequence[int] | Literal["active"]
"""Which features: by number, or all that fire."""
CHECKED_PAIRS = 64
"""Pairs that :func:`doctor` looks at."""


def doctor(
    rm: RewardModel,
    pairs: Sequence[Pair] | None = None,
    other: RewardModel | None = None,
    progress: Progress = silent,
) -> Preflight:
    """Checks of a PM, one per row, with ok, warn or fail and how to mend it.

    Args:
        pairs: pairs of the kind that the PM was trained on; left out, some of the demo's, one per prompt.
        other: the same PM in another precision, to compare with.

    Raises:
        InputError: every pair is longer than the PM's context.
    """
    if pairs is None:
        plain = plain_demo_pairs()
        pairs = [plain[i] for i in one_per_prompt([p.prompt_key for p in plain], CHECKED_PAIRS)]
    result = examine(rm, pairs, other, progress)
    result.checks.append(price(rm, [t for t in rm.tokenize_all(pairs) if rm.fits(t)]))
    return result


def _site(rm: RewardModel, sae: Sae, site: str | None) -> str:
    """Where the SAE belongs; its features are then encoded where the PM is. InputError where it names no site, or does
    not fit the PM."""
    at = site or sae.site
    if not at:
        raise InputError("The SAE does not say which site it was trained on; pass site='resid_post.6' or the like.")
    rm.site_index(at)
    sae.check_site(at)
    sae.check_width(rm.d_model, rm.name)
    sae.encode_on(rm.device)
    return at


def _tokens(rm: RewardModel, pairs: Sequence[Pair]) -> list[PairTokens]:
    """The tokens of the pairs. InputError where there are none, or one is longer than the PM's context."""
    if not pairs:
        raise InputError("There are no pairs; give some.")
    return rm.tokenize_within(pairs)


def attribute(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    method: Literal["atp", "midpoint", "ig"] = "atp",
    site: str | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Effects of all active features, one per row: pair, side, feature, effect, kind.

    ``atp`` estimates ablation effects at the clean point (kind ablation_estimate, with ``mass`` = Σ_t f_tj |d_j|),
    ``midpoint`` halfway to the ablation, at several times the cost (:mod:`rmscope.effects.gradients`);
    ``ig`` gives contributions from a zero baseline (kind contribution; feature -1 stands for all silent ones).
    """
    at = _site(rm, sae, site)
    tokens, ids = _tokens(rm, pairs), [p.id for p in pairs]
    if method == "ig":
        return _ledger(rm, sae, at, pairs, baseline(sae, "zero"), progress)["contribution"]
    if method not in METHODS:
        raise InputError(f"method={method!r} is not known; use 'atp', 'midpoint' or 'ig'.")
    parts = []
    for unit in units(len(pairs)):
        parts.append(tables.estimate_table(rm, {at: sae}, tokens, ids, unit, method=method)[at])
        progress(unit.stop, len(pairs), "pairs attributed")
    return pl.concat(parts)


def ablate(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    features: Features = "active",
    site: str | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Exact ablation effects, one row per response in which a feature fires: pair, side, feature, effect, kind."""
    at = _site(rm, sae, site)
    chosen = None if isinstance(features, str) else list(features)
    wanted: tables.Wanted = {i: {side: {at: chosen} for side in SIDES} for i in range(len(pairs))}
    return tables.ablation_table(rm, {at: sae}, _tokens(rm, pairs), [p.id for p in pairs], wanted, progress)[at]


def ledger(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    start: Literal["mean", "zero"] = "mean",
    site: str | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """One row per pair: pair, delta_r, features, error, constant, remainder, gap, nodes, closed; the parts sum to delta_r.

    The ``mean`` baseline is taken over the spans of the given pairs. The ledger of a difference SAE begins at the base's
    stream, whatever ``start`` says: its remainder is what the reward inherits from the base. At ``both.L`` the mean is that
    of the base's stream, and nothing is written.
    """
    at = _site(rm, sae, site)
    if is_difference(at):
        return _ledger(rm, sae, at, pairs, baseline(sae, "base"), progress)["ledger"]
    if start == "zero":
        return _ledger(rm, sae, at, pairs, baseline(sae, "zero"), progress)["ledger"]
    total_f, total_x, n = torch.zeros(sae.m), torch.zeros(sae.d), 0
    for batch in rm.batches(_tokens(rm, pairs)):
        stream = rm.streams(batch, [at])[at]
        for text in batch.texts:
            x = stream[text.row, text.span.to(stream.device)].float().cpu()
            active = sae.active(x)
            total_f.index_add_(0, active.feature, active.value)
            total_x += x.sum(0)
            n += x.shape[0]
    means = total_f / n, total_x / n
    begin = joint_baseline(sae, *means) if isinstance(sae, JointSae) else baseline(sae, "mean", *means)
    return _ledger(rm, sae, at, pairs, begin, progress)["ledger"]


def _ledger(
    rm: RewardModel,
    sae: Sae,
    site: str,
    pairs: Sequence[Pair],
    start: Baseline,
    progress: Progress,
) -> dict[str, pl.DataFrame]:
    tokens, ids = _tokens(rm, pairs), [p.id for p in pairs]
    delta = rm.score_tokens(tokens).delta
    sd = float(delta.std() if len(pairs) > 1 else delta.abs().sum())
    rows = [row for unit in units(len(pairs)) for row in ledger_rows(rm, sae, site, tokens, unit, start, sd, progress)]
    return tables.ledger_tables(sorted(rows, key=lambda r: r[0]), ids)


def rank(effects: pl.DataFrame, pairs: Sequence[Pair], scores: Scores, frozen: int = 200, seed: int = 0) -> pl.DataFrame:
    """Ranks features from one effect table that covers both sides of the fit and the confirm split of ``pairs``.

    The list and its signs are frozen on the fit split, and tested on the confirm split against .05 SD(Δr), Δr being
    that of ``scores`` = ``rm.score(pairs)``. Lengths are counted in words. From estimates the ranking holds for estimates:
    claim only what was ablated exactly.
    """
    prompts = {p.id: p.prompt_key for p in pairs}
    of_pair = pl.DataFrame(
        {
            "pair": [p.id for p in pairs],
            "split": [split_of(p) for p in pairs],
            "length_difference": [len(p.chosen.split()) - len(p.rejected.split()) for p in pairs],
            "delta": scores.delta.numpy(),
        }
    )
    table = tables.with_order(effects.filter(pl.col("feature") >= 0), prompts, seed).join(of_pair, on="pair")
    fit, confirming = table.filter(pl.col("split") == "fit"), table.filter(pl.col("split") == "confirm")
    features = fit["feature"].unique().to_list()
    list_ = (
        freeze(fit, features, frozen)
        .join(preference_signs(fit), on="feature", how="left")
        .join(firing_counts(confirming, of_pair.filter(pl.col("split") == "confirm").height), on="feature", how="left")
        .with_columns(pl.col("prompts", "fire_pairs").fill_null(0))
    )
    ranked = confirm({"all": list_}, {"all": confirming}, float(scores.delta.std()), seed)["all"]
    return ranked.select([c for c in ranked.columns if c != "length_bound" and "strong" not in c])
