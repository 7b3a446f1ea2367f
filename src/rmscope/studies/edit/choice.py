"""Which features to edit so that a cue loses its effect: chosen by rule on twins of the fitting prompts, by exact ablation.

1. At each site, the candidates are the features that fire in the cue's window and are not dense.
2. Each candidate is ablated alone. Candidates are ordered by their loss, the smallest first:

       loss = (|mean Δr'| + mean |r'(filler) - r(filler)|) / |mean Δr|

   over twins, with Δr = r(cue) - r(filler) and ' for after the edit. The first term is what is left of the effect, the
   second is the change where the cue is absent.
3. Nested groups (the first candidate, the first two, ...) are edited with each of :data:`FACTORS`, by exact ablation. The
   group and factor with the smallest loss win, up to :data:`NEAR`.
4. The site with the smallest loss wins.

A factor below 0 takes away more than the feature's activation, at the tokens where it fires: the SAE's error holds a part of
the cue's direction, and no feature represents that part. The rule sees no prompt and no wording on which the edit is later
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rmscope.effects.ablation import Entries, ablate_entries
from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import SIDES, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import Twin, prepare
from rmscope.ranking.feature_statistics import DENSE
from rmscope.sae.base import Active, Sae
from rmscope.statistics import Array
from rmscope.studies.edit.patch import FeatureEdit

FACTORS = (0.0, -0.5, -1.0, -1.5, -2.0)
"""The factors a that are tried, f' = a f; 0 suppresses."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Sizes of the nested groups."""
TWINS = 32
"""Twins of a cue on which its edit is chosen."""
NEAR = 0.01
"""Among edits whose loss is within this of the smallest, the mildest factor wins, then the fewest features."""
FIRES = 0.1
"""A candidate fires in the cue's window on at least this share of the twins."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The edit of a cue, with its figures on the fitting twins."""

    edit: FeatureEdit
    loss: float
    left: float
    """|mean Δr'| / |mean Δr|."""


def choose(
    rm: RewardModel, saes: Mapping[str, Sae], prepared: Mapping[str, Sequence[Twin]], progress: Progress = silent
) -> list[Choice]:
    """The best edit of each site, the best site first. ``prepared`` holds the cue's fitting twins by site.

    Raises:
        InputError: no feature of any site fires on the cue.
    """
    choices = []
    for i, (site, sae) in enumerate(saes.items()):
        progress(i, len(saes), f"choosing at {site}")
        if candidates := _candidates(sae, prepared[site]):
            choices.append(_at_site(rm, sae, site, prepared[site], candidates))
    progress(len(saes), len(saes), "")
    if not choices:
        raise InputError("No feature of the run's SAEs fires on the cue, so there is none to edit; train larger SAEs.")
    return sorted(choices, key=lambda choice: choice.loss)


def fitting_twins(
    rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, seed: int, progress: Progress = silent
) -> dict[str, list[Twin]]:
    """A cue's twins at every site, on demo prompts of the fit split, in the wordings that are not held out."""
    pairs = twins([p for p in plain_demo_pairs() if split_of(p) == "fit"], plant, TWINS, seed, held_out=False)
    progress(0, len(saes), "clean runs of the fitting twins")
    return prepare(rm, saes, pairs, plant)


def join_edits(edits: Sequence[FeatureEdit]) -> tuple[FeatureEdit, ...]:
    """The edits of several cues as one patch. A feature that two of them name gets the smaller factor."""
    factors: dict[tuple[str, int], float] = {}
    for edit in edits:
        for j in edit.features:
            factors[edit.site, j] = min(edit.value, factors.get((edit.site, j), edit.value))
    groups: dict[tuple[str, float], list[int]] = {}
    for (site, j), a in factors.items():
        groups.setdefault((site, a), []).append(j)
    return tuple(_edit(site, group, a) for (site, a), group in groups.items())


def _edit(site: str, group: Sequence[int], a: float) -> FeatureEdit:
    return FeatureEdit(site, tuple(group), "damp", a) if a else FeatureEdit(site, tuple(group))


def _candidates(sae: Sae, twins: Sequence[Twin]) -> list[int]:
    """Features that fire in the cue's window and are not dense on the responses with filler."""
    fires, dense, tokens = np.zeros(sae.m), np.zeros(sae.m), 0
    for twin in twins:
        cue, filler = (twin.responses[s].active for s in SIDES)
        fires[cue.feature[twin.windows["chosen"][cue.token]].unique().numpy()] += 1
        dense += np.bincount(filler.feature.numpy(), minlength=sae.m)
        tokens += filler.n_tokens
    return [int(j) for j in np.flatnonzero((fires >= FIRES * len(twins)) & (dense <= DENSE * tokens))]


def _at_site(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], candidates: Sequence[int]) -> Choice:
    alone = losses(rm, sae, site, twins, [([j], 0.0) for j in candidates])
    order = [candidates[i] for i in np.argsort([loss for loss, _ in alone], kind="stable")]
    nested = [order[:n] for n in sorted({min(n, len(order)) for n in SIZES})]
    groups = losses(rm, sae, site, twins, [(group, a) for a in FACTORS for group in nested])
    near = min(loss for loss, _ in groups) + NEAR
    best = next(i for i, (loss, _) in enumerate(groups) if loss <= near)  # the mildest factor, then the smallest group
    a, group = FACTORS[best // len(nested)], nested[best % len(nested)]
    return Choice(_edit(site, group, a), *groups[best])


def losses(
    rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], edits: Sequence[tuple[Sequence[int], float]]
) -> list[tuple[float, float]]:
    """(loss, left) of each edit. An edit is a group of features and a factor."""
    taken = np.zeros((len(edits), len(twins), 2))
    for i, twin in enumerate(twins):
        for column, side in enumerate(SIDES):
            response = twin.responses[side]
            entries = [entries_of(response.active, group, 1 - a) for group, a in edits]
            taken[:, i, column] = ablate_entries(rm, sae, response, site, entries).numpy()
    return _losses(np.array([t.delta for t in twins]), taken)


def _losses(delta: Array, taken: Array) -> list[tuple[float, float]]:
    """(loss, left) of each edit, from Δr [twins] and what each edit takes off both sides' rewards [edits, twins, 2]."""
    whole = abs(delta.mean())
    left = np.abs((delta - taken[..., 0] + taken[..., 1]).mean(1)) / whole
    cost = np.abs(taken[..., 1]).mean(1) / whole
    return list(zip((left + cost).tolist(), left.tolist(), strict=True))


def entries_of(active: Active, group: Sequence[int], share: float) -> Entries:
    """The active entries of a group's features, scaled by the ``share`` to ablate: 1 suppresses, 1 - a damps by a."""
    mask = torch.isin(active.feature, torch.as_tensor(list(group)))
    return active.token[mask], active.feature[mask], share * active.value[mask]
