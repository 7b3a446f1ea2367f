"""The rule that chooses which features are edited so that a cue loses its effect, and the controls that it chooses.

1. At each site, the candidates are the features that fire in the cue's window and are not dense.
2. Each candidate is ablated alone, exactly. Candidates are ordered by their loss, the smallest first:

       loss = (|mean Δr'| + mean |r'(filler) - r(filler)|) / |mean Δr|

   over twins, with Δr = r(cue) - r(filler) and ' for after the edit. The first term is what is left of the effect, the
   second is the change where the cue is absent.
3. Nested groups (the first candidate, the first two, ...) are edited with each of :data:`FACTORS`, again by ablation. The
   site, group and factor with the smallest loss win, up to :data:`NEAR`.

A factor below 0 takes away more than the feature's activation, because the SAE's error holds a part of the cue's direction.

*Controls.* The rule picks the best of many edits on its twins. An edit of features that are drawn at random is no match for
it, so a control is chosen by the same rule on the same twins, with as many features, from a pool that has one feature of
like firing and mass for each candidate, and none that is edited. A control is chosen at the edit's site alone, while the
edit's site is the best of all. All features that fire on the cue are candidates, so a pool also holds what the rule passed
over. A control tells whether other features could do as well; it is no test at a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from rmscope.effects.ablation import Entries, ablate_entries
from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.planted.twins import Twin, group_effects, matched_groups
from rmscope.ranking.feature_statistics import DENSE
from rmscope.sae.base import Active, Sae
from rmscope.studies.edit.patch import FeatureEdit
from rmscope.studies.edit.result import CueChoice

FACTORS, SIZES = (0.0, -0.5, -1.0, -1.5, -2.0), (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""The factors a that are tried, f' = a f (0 suppresses), and the sizes of the nested groups."""
FIRES = 0.1
"""A candidate fires in the cue's window on at least this share of the twins."""
NEAR = 0.01
"""Among edits whose loss is within this of the smallest, the mildest factor wins, then the fewest features."""
AnyEdit = TypeVar("AnyEdit", bound=FeatureEdit)
Fitted = Mapping[str, Sequence[Twin]]
"""By site: the twins on which the edit of a cue is chosen."""


def choose(rm: RewardModel, saes: Mapping[str, Sae], fitted: Fitted, progress: Progress = silent) -> list[CueChoice]:
    """The best edit of each site, the best site first. InputError where no feature of any site fires on the cue."""
    choices = []
    for i, (site, sae) in enumerate(saes.items()):
        progress(i, len(saes), f"choosing at {site}")
        if candidates := _candidates(sae, fitted[site]):
            choices.append(_at_site(rm, sae, site, fitted[site], candidates))
    progress(len(saes), len(saes), "")
    if not choices:
        raise InputError("No feature of the run's SAEs fires on the cue, so there is none to edit; train larger SAEs.")
    return sorted(choices, key=lambda choice: choice.loss)


def choose_controls(
    rm: RewardModel, saes: Mapping[str, Sae], chosen: Sequence[CueChoice], fitted: Sequence[Fitted], n: int
) -> list[Sequence[CueChoice]]:
    """At most ``n`` controls of the edits that :func:`choose` chose, one edit per cue; ``fitted`` has one entry per cue.

    Each counts once. A control lacks the edit of a cue where no feature is left for it; one without any edit is left out.
    """
    edited = {c.site: [j for other in chosen if other.site == c.site for j in other.features] for c in chosen}
    controls: list[list[CueChoice]] = [[] for _ in range(n)]
    for edit, twins in zip(chosen, (of[c.site] for c, of in zip(chosen, fitted, strict=True)), strict=True):
        sae = saes[edit.site]
        candidates = [*edit.features, *(j for j in _candidates(sae, twins) if j not in edit.features)]
        pools = matched_groups(sae, twins, candidates, n, edited[edit.site])
        for control, pool in zip(controls, pools, strict=True):
            if pool:
                control.append(_at_site(rm, sae, edit.site, twins, pool, [len(edit.features)]))
    return distinct_edits(controls)


def distinct_edits(controls: Sequence[Sequence[AnyEdit]]) -> list[Sequence[AnyEdit]]:
    """The controls that edit something, equal ones once: where free features are few, draws repeat."""
    keys = [frozenset((edit.site, frozenset(edit.features), edit.value) for edit in control) for control in controls]
    distinct = dict(zip(keys, controls, strict=True))
    return [control for control in distinct.values() if any(edit.features for edit in control)]


def _candidates(sae: Sae, twins: Sequence[Twin]) -> list[int]:
    """Features that fire in the cue's window and are not dense on the responses with filler."""
    fires, dense, tokens = np.zeros(sae.m), np.zeros(sae.m), 0
    for twin in twins:
        cue, filler = (twin.responses[s].active for s in SIDES)
        fires[cue.feature[twin.windows["chosen"][cue.token]].unique().numpy()] += 1
        dense += np.bincount(filler.feature.numpy(), minlength=sae.m)
        tokens += filler.n_tokens
    return [int(j) for j in np.flatnonzero((fires >= FIRES * len(twins)) & (dense <= DENSE * tokens))]


def _at_site(
    rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], candidates: Sequence[int], sizes: Sequence[int] = SIZES
) -> CueChoice:
    alone = losses(rm, sae, site, twins, [([j], 0.0) for j in candidates])
    order = [candidates[i] for i in np.argsort([loss for loss, _ in alone], kind="stable")]
    nested = [order[:n] for n in sorted({min(n, len(order)) for n in sizes})]
    edits = [(group, a) for a in FACTORS for group in nested]  # the mildest factor first, then the smallest group
    measured = losses(rm, sae, site, twins, edits)
    near = min(loss for loss, _ in measured) + NEAR
    best = next(i for i, (loss, _) in enumerate(measured) if loss <= near)
    (group, a), (loss, left) = edits[best], measured[best]
    return CueChoice(site, tuple(group), "damp" if a else "suppress", a, left=left, loss=loss)


def losses(
    rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], edits: Sequence[tuple[Sequence[int], float]]
) -> list[tuple[float, float]]:
    """(loss, left) of each edit. An edit is a group of features and a factor. What a suppressed group does to a twin is
    computed once; many controls have features in common."""
    taken = np.zeros((2, len(edits), len(twins)))
    suppressed = np.array([a == 0 for _, a in edits], dtype=bool)
    groups, scaled = [{site: list(group)} for group, a in edits if a == 0], [edit for edit in edits if edit[1] != 0]
    for i, twin in enumerate(twins):
        for row, side in enumerate(SIDES):
            response = twin.responses[side]
            entries = [entries_of(response.active, group, 1 - a) for group, a in scaled]
            taken[row, suppressed, i] = group_effects(rm, {site: sae}, {site: twin}, side, groups)
            taken[row, ~suppressed, i] = ablate_entries(rm, sae, response, site, entries).numpy()
    delta, (cue, filler) = np.array([t.delta for t in twins]), taken
    left = np.abs((delta - cue + filler).mean(1)) / abs(delta.mean())
    cost = np.abs(filler).mean(1) / abs(delta.mean())
    return list(zip((left + cost).tolist(), left.tolist(), strict=True))


def entries_of(active: Active, group: Sequence[int], share: float) -> Entries:
    """The active entries of a group's features, scaled by the ``share`` to ablate: 1 suppresses, 1 - a damps by a."""
    mask = torch.isin(active.feature, torch.as_tensor(list(group)))
    return active.token[mask], active.feature[mask], share * active.value[mask]


def join_edits(edits: Sequence[FeatureEdit]) -> tuple[FeatureEdit, ...]:
    """The edits of several cues as one patch. A feature that two of them name gets the smaller factor."""
    factors: dict[tuple[str, int], float] = {}
    for edit in edits:
        for j in edit.features:
            factors[edit.site, j] = min(edit.value, factors.get((edit.site, j), edit.value))
    groups: dict[tuple[str, float], list[int]] = defaultdict(list)
    for (site, j), a in factors.items():
        groups[site, a].append(j)
    return tuple(FeatureEdit(site, tuple(group), "damp" if a else "suppress", a) for (site, a), group in groups.items())
