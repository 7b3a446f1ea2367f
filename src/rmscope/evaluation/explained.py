"""How much of Δr one site explains, on held-out pairs: splice, keep K and ablate K, each with its controls beside it.

Everything that is chosen (the list's order, flags, means, donors, control dictionaries) comes from stored responses of the
select split and is frozen; the figures come from other prompts (METHOD, "Explained").
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
from rmscope.evaluation.keep import ABLATED, GRID, AblationBaseline, Donors, ablate, error_alone, keep, keep_curve, lost
from rmscope.evaluation.reconstruction import evaluate
from rmscope.evaluation.selection import Responses, differences, forward_order, length_flags, profile
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array

SELECTED = 96
"""Select pairs on which the lists are made."""
COARSE = (0, 8, 32, 128, 512)
"""The grid of the curves that stand beside the main one."""
MATCHED = 3
"""Draws of matched features beside a list that is ablated."""
PCA_TOKENS = 20_000
FLAGGED_OF = 64
"""The first features of a list whose flags are counted."""


@dataclass(frozen=True)
class SelectSplit:
    """The pairs that a store was harvested from, in its order, and which of them belong to the select split."""

    store: ActivationStore
    tokens: Sequence[PairTokens]
    prompts: Sequence[str]
    pairs: Sequence[int]


class FrozenSelection:
    """What is frozen on the select split at a site: orders, flags, means, donors, control dictionaries."""

    def __init__(
        self, rm: RewardModel, site: str, sae: Sae, select: SelectSplit, prompts: Sequence[str], progress: Progress = silent
    ) -> None:
        """``prompts`` names the prompt of each pair that will be measured: donors never share it."""
        self.sae, tokens = sae, select.tokens
        responses = Responses(select.store, site, set(select.pairs))

        def ending(pair: int, side: str) -> int:
            ids = tokens[pair].side(side)
            return rm.ending(ids[: rm.read_position(ids) + 1]) - tokens[pair].divergence

        self.profile = p = profile(sae, responses, ending)
        x, d = responses.sample(PCA_TOKENS), rm.d_model
        basis = controls.principal_components(x)
        l0 = max(1, round(float((sae.encode(x[:4096]) > 0).sum(1).float().mean())))
        self.pca, self.coordinates = controls.signed(basis, p.x_mean), controls.signed(torch.eye(d), p.x_mean)
        self.sparse_pca = controls.signed(basis, p.x_mean, l0)
        self.random = controls.random_dictionary(x, sae.m, l0)
        chosen = [tokens[i] for i in select.pairs[:SELECTED]]
        f_pca, f_coordinates = (one.encode(x).mean(0) for one in (self.pca, self.coordinates))
        dictionaries = {
            "features": (sae, p.f_mean), "pca": (self.pca, f_pca), "coordinates": (self.coordinates, f_coordinates),
        }  # fmt: skip
        D, delta = differences(rm, dictionaries, site, chosen, p.x_mean, progress=progress)
        lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in chosen], dtype=float)
        self.length_slope = slope(delta, lengths)
        order = forward_order(D["features"], delta)
        self.flagged = p.dense | p.ending | length_flags(D["features"], lengths)
        self.order, self.unflagged = order[:, None], order[~self.flagged[order]][:, None]
        pairs_of = controls.signed_units(d)
        both = {name: D[name][:, :d] + D[name][:, d:] for name in ("pca", "coordinates")}
        self.pca_order, self.coordinate_order = (pairs_of[forward_order(both[n], delta)] for n in ("pca", "coordinates"))
        self.donors = donors = Donors(responses, select.prompts, prompts)
        self.ground = AblationBaseline(sae, donors, p.f_mean, p.x_mean)
        self.pca_ground = AblationBaseline(self.pca, donors, f_pca, p.x_mean)
        self.coordinate_ground = AblationBaseline(self.coordinates, donors, f_coordinates, p.x_mean)

    @property
    def ablated(self) -> list[int]:
        """The K at which a list is ablated: of ABLATED, those that leave as many features to match."""
        return [k for k in ABLATED if 2 * k <= self.sae.m]

    def sets(self) -> list[list[Array]]:
        """The list's top K, then MATCHED draws of matched features, at each K that is ablated."""
        top = [self.order[:k, 0] for k in self.ablated]
        draws = [controls.matched(self.profile, top[-1], top[-1], seed) for seed in range(MATCHED)]
        return [top, *([draw[:k] for k in self.ablated] for draw in draws)]


def explain(
    rm: RewardModel,
    site: str,
    lists: FrozenSelection,
    tokens: Sequence[PairTokens],
    prompts: Sequence[str],
    progress: Progress = silent,
) -> dict[str, Any]:
    """All figures of a site on the given pairs: ``evaluation`` (splice), ``controls``, ``curves`` (keep K), ``ablated``.

    Each figure is {value, low, high}, the interval 95 %, bootstrap by prompt. ``curves`` has a row a K: with donors, from
    the mean, with a single donor, agreement; beside it the list without flagged features, PCA and coordinates.
    """
    sae, groups, full = lists.sae, np.array(prompts), (*(k for k in GRID if k < lists.sae.m), lists.sae.m)
    sets = lists.sets()
    found = replaced(
        rm,
        tokens,
        range(len(tokens)),
        {
            name: (site, replacement)
            for name, replacement in {
                "pca": splice(lists.sparse_pca), "random": splice(lists.random), "noise": controls.noise(sae),
                "error": error_alone(lists.ground), "keep": keep(lists.ground, lists.order, full),
                "unflagged": keep(lists.ground, lists.unflagged, COARSE),
                "keep_pca": keep(lists.pca_ground, lists.pca_order, COARSE),
                "keep_coordinates": keep(lists.coordinate_ground, lists.coordinate_order, COARSE),
                "ablate": ablate(sae, sets), "norm": controls.norm_matched(sae, lists.donors, sets[0]),
            }.items()
        },
        progress,
    )  # fmt: skip
    delta = found["keep"].delta
    (measured,) = evaluate(rm, {site: sae}, tokens, list(prompts))
    lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in tokens], dtype=float)
    one = {n: delta_r2(delta, found[n].delta_hat[:, 0], groups) for n in ("pca", "random", "noise")}
    one["length"] = delta_r2(delta, lists.length_slope * lengths, groups)
    one["error"] = delta_r2(delta, found["error"].delta_hat[:, :-1].mean(1), groups)
    one["error_mean"] = delta_r2(delta, found["error"].delta_hat[:, -1], groups)
    grids = {"keep": full, "unflagged": COARSE, "keep_pca": COARSE, "keep_coordinates": COARSE}
    return {
        "site": site,
        "evaluation": {n: f.as_dict() for n, f in measured.figures.items()} | {"dead": measured.dead},
        "controls": {n: f.as_dict() for n, f in one.items()},
        "flagged": int(lists.flagged.sum()),
        f"flagged_of_{FLAGGED_OF}": int(lists.flagged[lists.order[:FLAGGED_OF, 0]].sum()),
        "curves": {n: [p.as_dict() for p in keep_curve(found[n], g, groups)] for n, g in grids.items()},
        "ablated": _ablated(found, lists.ablated, groups),
        "pairs": len(tokens),
        "prompts": len(np.unique(groups)),
    }


def _ablated(found: dict[str, Replaced], ks: Sequence[int], prompts: Array) -> list[dict[str, Any]]:
    delta = found["ablate"].delta
    hat = found["ablate"].delta_hat.reshape(len(delta), 1 + MATCHED, len(ks))
    return [
        {
            "k": k,
            "list": lost(delta, hat[:, 0, i], prompts).as_dict(),
            "matched": lost(delta, hat[:, 1:, i].mean(1), prompts).as_dict(),
            "norm": lost(delta, found["norm"].delta_hat[:, i], prompts).as_dict(),
        }
        for i, k in enumerate(ks)
    ]
