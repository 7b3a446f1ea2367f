"""How much of Δr one site explains, on held-out pairs: splice, keep K and ablate K, each with its controls.

Everything that is chosen (the order of the list, flags, means, donors, control dictionaries) is computed from stored
responses of the select split and then frozen. The figures are measured on other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rmscope.activations.store import ActivationStore
from rmscope.effects.splice import Replaced, delta_r2, replaced, slope, splice
from rmscope.evaluation import controls
from rmscope.evaluation.keep import (
    ABLATE_GRID,
    GRID,
    AblationBaseline,
    Donors,
    KeepPoint,
    ablate,
    error_alone,
    keep,
    keep_curve,
    lost_share,
)
from rmscope.evaluation.reconstruction import Evaluation, evaluate
from rmscope.evaluation.selection import Responses, differences, forward_order, length_flags, profile
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure

SELECT_PAIRS = 96
"""Select pairs on which the lists are ordered."""
COARSE_GRID = (0, 8, 32, 128, 512)
"""K of the control curves."""
MATCHED_DRAWS = 3
"""Draws of matched features for each ablated list."""
PCA_TOKENS = 20_000
FLAG_WINDOW = 64
"""The first features of a list, of which the flagged ones are counted."""


@dataclass(frozen=True)
class SelectSplit:
    """The pairs that a store was harvested from, in its order, and which of them belong to the select split."""

    store: ActivationStore
    tokens: Sequence[PairTokens]
    prompts: Sequence[str]
    pairs: Sequence[int]


class FrozenSelection:
    """All that is frozen at a site on the select split: orders, flags, means, donors, control dictionaries."""

    def __init__(
        self, rm: RewardModel, site: str, sae: Sae, select: SelectSplit, prompts: Sequence[str], progress: Progress = silent
    ) -> None:
        """``prompts`` names the prompt of each pair that will be measured: donors never share it.

        1. Stored responses give means, firing rates and flags.
        2. They also give the control dictionaries, which have as many active units on a token as the SAE.
        3. Contributions on select pairs put the units of each dictionary in order.
        4. Donors and means become the baselines.
        """
        self.sae, tokens = sae, select.tokens
        responses = Responses(select.store, site, set(select.pairs))

        def ending(pair: int, side: str) -> int:
            ids = tokens[pair].side(side)
            return rm.ending(ids[: rm.read_position(ids) + 1]) - tokens[pair].divergence

        self.profile = p = profile(sae, responses, ending)

        x, d = responses.sample(PCA_TOKENS), rm.d_model
        basis = controls.principal_components(x)
        l0 = max(1, round(float((sae.encode(x[:4096]) > 0).sum(1).float().mean())))
        self.pca = controls.signed_basis(basis, p.x_mean)
        self.coordinates = controls.signed_basis(torch.eye(d), p.x_mean)
        self.sparse_pca = controls.signed_basis(basis, p.x_mean, l0)
        self.random = controls.random_dictionary(x, sae.m, l0)

        selected = [tokens[i] for i in select.pairs[:SELECT_PAIRS]]
        means = {"features": p.f_mean, "pca": self.pca.encode(x).mean(0), "coordinates": self.coordinates.encode(x).mean(0)}
        saes = {"features": sae, "pca": self.pca, "coordinates": self.coordinates}
        dictionaries = {name: (one, means[name]) for name, one in saes.items()}
        D, delta = differences(rm, dictionaries, site, selected, p.x_mean, progress=progress)
        lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in selected], dtype=float)
        self.length_slope = slope(delta, lengths)
        self.flagged = p.dense | p.ending | length_flags(D["features"], lengths)
        order = forward_order(D["features"], delta)
        self.order, self.unflagged = order[:, None], order[~self.flagged[order]][:, None]
        units = controls.signed_units(d)
        self.pca_order, self.coordinate_order = (
            units[forward_order(D[name][:, :d] + D[name][:, d:], delta)] for name in ("pca", "coordinates")
        )

        self.donors = Donors(responses, select.prompts, prompts)
        self.baseline, self.pca_baseline, self.coordinate_baseline = (
            AblationBaseline(one, self.donors, means[name], p.x_mean) for name, one in saes.items()
        )

    @property
    def ablate_grid(self) -> list[int]:
        """The K at which the list is ablated: those of ABLATE_GRID that leave as many features to match."""
        return [k for k in ABLATE_GRID if 2 * k <= self.sae.m]

    def ablation_sets(self) -> list[list[Array]]:
        """The list's top K, then MATCHED_DRAWS draws of matched features, at each K of :attr:`ablate_grid`."""
        top = [self.order[:k, 0] for k in self.ablate_grid]
        draws = [controls.matched_controls(self.profile, top[-1], top[-1], seed) for seed in range(MATCHED_DRAWS)]
        return [top, *([draw[:k] for k in self.ablate_grid] for draw in draws)]


@dataclass(frozen=True, slots=True)
class AblatePoint:
    """Ablate K at one K: the share of Δr that is lost."""

    k: int
    list: Figure
    """Without the list's top K."""
    matched: Figure
    """Without K matched features, the mean over draws."""
    norm: Figure
    """With a move as large as the ablation, along differences of real activations."""

    def as_dict(self) -> dict[str, Any]:
        return {"k": self.k, **{name: getattr(self, name).as_dict() for name in ("list", "matched", "norm")}}


@dataclass(frozen=True)
class Explained:
    """How much of Δr a site explains. Every figure is a delta_r2 or a share; intervals are 95 %, bootstrap by prompt."""

    site: str
    evaluation: Evaluation
    """The splice, sparsity and reconstruction of the SAE."""
    controls: dict[str, Figure]
    """delta_r2 of pca, random, noise (each spliced), length (alone), error and error_mean (the error alone)."""
    flagged: int
    """Flagged features of the SAE."""
    flagged_first: int
    """Flagged features among the first FLAG_WINDOW of the list."""
    curves: dict[str, list[KeepPoint]]
    """Keep K: keep (the list), unflagged (the list without flagged features), keep_pca, keep_coordinates."""
    ablated: list[AblatePoint]
    pairs: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, as ``explained.json`` stores it."""
        e = self.evaluation
        return {
            "site": self.site,
            "evaluation": {name: f.as_dict() for name, f in e.figures.items()} | {"dead": e.dead},
            "controls": {name: f.as_dict() for name, f in self.controls.items()},
            "flagged": self.flagged,
            f"flagged_of_{FLAG_WINDOW}": self.flagged_first,
            "curves": {name: [p.as_dict() for p in points] for name, points in self.curves.items()},
            "ablated": [p.as_dict() for p in self.ablated],
            "pairs": self.pairs,
            "prompts": self.prompts,
        }


def explain(
    rm: RewardModel,
    site: str,
    selection: FrozenSelection,
    tokens: Sequence[PairTokens],
    prompts: Sequence[str],
    progress: Progress = silent,
) -> Explained:
    """Every figure of a site on the given pairs; ``prompts`` names the prompt of each pair."""
    sae, groups, s = selection.sae, np.array(prompts), selection
    full = (*(k for k in GRID if k < sae.m), sae.m)
    sets = s.ablation_sets()
    replacements = {
        "pca": splice(s.sparse_pca),
        "random": splice(s.random),
        "noise": controls.noise(sae),
        "error": error_alone(s.baseline),
        "keep": keep(s.baseline, s.order, full),
        "unflagged": keep(s.baseline, s.unflagged, COARSE_GRID),
        "keep_pca": keep(s.pca_baseline, s.pca_order, COARSE_GRID),
        "keep_coordinates": keep(s.coordinate_baseline, s.coordinate_order, COARSE_GRID),
        "ablate": ablate(sae, sets),
        "norm": controls.norm_matched_moves(sae, s.donors, sets[0]),
    }
    at_site = {name: (site, replacement) for name, replacement in replacements.items()}
    rows = replaced(rm, tokens, range(len(tokens)), at_site, progress)
    delta, error = rows["keep"].delta, rows["error"].delta_hat
    lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in tokens], dtype=float)
    control = {name: delta_r2(delta, rows[name].delta_hat[:, 0], groups) for name in ("pca", "random", "noise")}
    control["length"] = delta_r2(delta, s.length_slope * lengths, groups)
    control["error"] = delta_r2(delta, error[:, :-1].mean(1), groups)
    control["error_mean"] = delta_r2(delta, error[:, -1], groups)
    grids = {"keep": full, "unflagged": COARSE_GRID, "keep_pca": COARSE_GRID, "keep_coordinates": COARSE_GRID}
    (evaluation,) = evaluate(rm, {site: sae}, tokens, list(prompts))
    return Explained(
        site=site,
        evaluation=evaluation,
        controls=control,
        flagged=int(s.flagged.sum()),
        flagged_first=int(s.flagged[s.order[:FLAG_WINDOW, 0]].sum()),
        curves={name: keep_curve(rows[name], grid, groups) for name, grid in grids.items()},
        ablated=_ablate_points(rows, s.ablate_grid, groups),
        pairs=len(tokens),
        prompts=len(np.unique(groups)),
    )


def _ablate_points(rows: dict[str, Replaced], ks: Sequence[int], prompts: Array) -> list[AblatePoint]:
    delta = rows["ablate"].delta
    hat = rows["ablate"].delta_hat.reshape(len(delta), 1 + MATCHED_DRAWS, len(ks))
    return [
        AblatePoint(
            k,
            list=lost_share(delta, hat[:, 0, i], prompts),
            matched=lost_share(delta, hat[:, 1:, i].mean(1), prompts),
            norm=lost_share(delta, rows["norm"].delta_hat[:, i], prompts),
        )
        for i, k in enumerate(ks)
    ]
