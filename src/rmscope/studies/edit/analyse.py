"""Edits features of a run's PM, named or chosen so that a cue loses its effect, and measures what that changes.

The rule (:mod:`.choice`) chooses on twins of the fitting prompts. It sees no prompt and no wording on which the edit is
later measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rmscope.errors import InputError
from rmscope.io import check_replaceable
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import Twin, prepare
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.studies.edit.check import before_after
from rmscope.studies.edit.choice import Fitted, choose, join_edits
from rmscope.studies.edit.gate import read_concepts
from rmscope.studies.edit.patch import EDIT_FILE, EXPORT_FILE, EditPatch, FeatureEdit, export_patch
from rmscope.studies.edit.result import CueChoice, EditResult
from rmscope.studies.edit.settings import EditConfig

TWINS = 32
"""Twins of a cue on which its edit is chosen."""


def analyse(run: Run, config: EditConfig) -> EditResult:
    """Suppresses, clamps or damps features of a run's SAEs. The SAE's error stays.

    1. Check the settings, and read the cues.
    2. Make the edits: from the named features, or for each cue by the rule.
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
    check = before_after(run, edits, plants, chosen, fitted, config) if config.check else None  # 4
    places = {"model": run.config.model, "patch": config.out, "export": config.export}
    return EditResult(**places, edits=edits, chosen=chosen, check=check, seconds=round(time.time() - started, 1))


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
