"""Edits features of a run's PM, named or chosen so that a cue loses its effect, and measures what that changes.

The rule chooses on twins of the fitting prompts. It sees no prompt and no wording on which the edit is later measured.

1. At each site, the candidates are the features that fire in the cue's window and are not dense.
2. Each candidate is ablated alone, exactly. Candidates are ordered by their loss, the smallest first:

       loss = (|mean Δr'| + mean |r'(filler) - r(filler)|) / |mean Δr|

   over twins, with Δr = r(cue) - r(filler) and ' for after the edit. The first term is what is left of the effect, the
   second is the change where the cue is absent.
3. Nested groups (the first candidate, the first two, ...) are edited with each of :data:`FACTORS`, again by ablation. The
   site, group and factor with the smallest loss win, up to :data:`NEAR`.

A factor below 0 takes away more than the feature's activation, because the SAE's error holds a part of the cue's direction.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from rmscope.effects.ablation import Entries, ablate_entries
from rmscope.errors import InputError
from rmscope.io import Progress, check_replaceable, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import SIDES, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import Twin, prepare
from rmscope.ranking.feature_statistics import DENSE
from rmscope.run.run import Run
from rmscope.sae.base import Active, Sae
from rmscope.studies.edit.check import Fitted, before_after
from rmscope.studies.edit.gate import read_concepts
from rmscope.studies.edit.patch import EDIT_FILE, EXPORT_FILE, EditPatch, FeatureEdit, export_patch
from rmscope.studies.edit.result import CueChoice, EditResult
from rmscope.studies.edit.settings import EditConfig

FACTORS, SIZES = (0.0, -0.5, -1.0, -1.5, -2.0), (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""The factors a that are tried, f' = a f (0 suppresses), and the sizes of the nested groups."""
TWINS, FIRES = 32, 0.1
"""Twins of a cue on which its edit is chosen; a candidate fires in the cue's window on at least this share of them."""
NEAR = 0.01
"""Among edits whose loss is within this of the smallest, the mildest factor wins, then the fewest features."""


def analyse(run: Run, config: EditConfig) -> EditResult:
    """Suppresses, clamps or damps features of a run's SAEs. The SAE's error stays.

    1. Check the settings, and read the cues.
    2. Make the edits: from the named features, or for each cue by the rule above.
    3. Write the patch to ``out``, and with ``export`` the folder for plain transformers.
    4. With ``check``: measure cues, pairs and RM-Bench before and after (``check.py``).

    Raises:
        InputError: the settings do not fit together, name an unknown site, feature or cue, or no feature fires on a cue.
    """
    started = time.time()
    _check_settings(config)  # 1
    plants, sites = read_concepts(config.concepts), [run.check_site(config.site)] if config.site else run.sites
    chosen, fitted = _edits_of_cues(run, plants, config.cue or [], sites)  # 2
    edits = join_edits(chosen) if config.cue else (_named_edit(config),)
    patch = EditPatch(edits, {e.site: run.saes[e.site] for e in edits}, run.rm.identity, run.config.model)
    patch.save(config.out)  # 3
    if config.export is not None:
        export_patch(run.rm, patch, config.export)
    check = before_after(run, edits, plants, fitted, config) if config.check else None  # 4
    given = {"model": run.config.model, "patch": config.out, "export": config.export}
    return EditResult(**given, edits=edits, chosen=chosen, check=check, seconds=round(time.time() - started, 1))


def _check_settings(config: EditConfig) -> None:
    check_replaceable(config.out, EDIT_FILE)
    if config.export is not None:
        check_replaceable(config.export, EXPORT_FILE)
    operations = config.suppress + (config.clamp is not None) + (config.damp is not None)
    if (config.pairs or config.rm_bench) and not config.check:
        raise InputError("--pairs and --rm-bench are measured with --check; add it.")
    if config.cue and (config.features or operations):
        raise InputError("--cue chooses features and factor by rule; leave out --features and the operation.")
    if not config.cue and (config.site is None or not config.features):
        raise InputError("There is nothing to edit; name --site and --features, or a --cue.")
    if operations > 1:
        raise InputError("A patch applies one operation to its features; choose one of --suppress, --clamp and --damp.")


def _named_edit(config: EditConfig) -> FeatureEdit:
    assert config.site is not None
    edit = FeatureEdit(config.site, tuple(config.features or ()))
    if config.clamp is not None:
        return replace(edit, operation="clamp", value=config.clamp)
    return edit if config.damp is None else replace(edit, operation="damp", value=config.damp)


def _edits_of_cues(
    run: Run, plants: Sequence[Plant], cues: Sequence[str], sites: Sequence[str]
) -> tuple[list[CueChoice], list[Fitted]]:
    """The best edit of each cue over the sites, and the twins on which it was chosen."""
    known, chosen, fitted = {p.name: p for p in plants}, list[CueChoice](), list[Fitted]()
    if missing := [name for name in cues if name not in known]:
        raise InputError(f"There is no cue {missing[0]}; known are {', '.join(known)}.")
    for name in dict.fromkeys(cues):
        saes = {site: run.saes[site] for site in sites}
        with run.display.stage(name) as progress:
            progress(0, len(saes), "clean runs of the fitting twins")
            fitted.append(fitting_twins(run.rm, saes, known[name], run.config.seed))
            chosen.append(replace(choose(run.rm, saes, fitted[-1], progress)[0], cue=name))
    return chosen, fitted


def fitting_twins(rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, seed: int) -> dict[str, list[Twin]]:
    """A cue's twins at every site, on demo prompts of the fit split, in the wordings that are not held out."""
    pairs = twins([p for p in plain_demo_pairs() if split_of(p) == "fit"], plant, TWINS, seed, held_out=False)
    return prepare(rm, saes, pairs, plant)


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


def _candidates(sae: Sae, twins: Sequence[Twin]) -> list[int]:
    """Features that fire in the cue's window and are not dense on the responses with filler."""
    fires, dense, tokens = np.zeros(sae.m), np.zeros(sae.m), 0
    for twin in twins:
        cue, filler = (twin.responses[s].active for s in SIDES)
        fires[cue.feature[twin.windows["chosen"][cue.token]].unique().numpy()] += 1
        dense += np.bincount(filler.feature.numpy(), minlength=sae.m)
        tokens += filler.n_tokens
    return [int(j) for j in np.flatnonzero((fires >= FIRES * len(twins)) & (dense <= DENSE * tokens))]


def _at_site(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], candidates: Sequence[int]) -> CueChoice:
    alone = losses(rm, sae, site, twins, [([j], 0.0) for j in candidates])
    order = [candidates[i] for i in np.argsort([loss for loss, _ in alone], kind="stable")]
    nested = [order[:n] for n in sorted({min(n, len(order)) for n in SIZES})]
    edits = [(group, a) for a in FACTORS for group in nested]  # the mildest factor first, then the smallest group
    measured = losses(rm, sae, site, twins, edits)
    near = min(loss for loss, _ in measured) + NEAR
    best = next(i for i, (loss, _) in enumerate(measured) if loss <= near)
    (group, a), (loss, left) = edits[best], measured[best]
    return CueChoice(site, tuple(group), "damp" if a else "suppress", a, left=left, loss=loss)


def losses(
    rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], edits: Sequence[tuple[Sequence[int], float]]
) -> list[tuple[float, float]]:
    """(loss, left) of each edit. An edit is a group of features and a factor."""
    taken = np.zeros((2, len(edits), len(twins)))
    for i, twin in enumerate(twins):
        for row, side in enumerate(SIDES):
            response = twin.responses[side]
            entries = [entries_of(response.active, group, 1 - a) for group, a in edits]
            taken[row, :, i] = ablate_entries(rm, sae, response, site, entries).numpy()
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
