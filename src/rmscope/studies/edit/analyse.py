"""Edits features of a run's PM, named or chosen for a cue, and measures what that changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rmscope.errors import InputError
from rmscope.pairs.plants import Plant
from rmscope.pairs.readers import load_pairs
from rmscope.planted.twins import Twin
from rmscope.run.run import Run
from rmscope.studies.edit import check
from rmscope.studies.edit.choice import Choice, choose, fitting_twins, join_edits
from rmscope.studies.edit.export import export
from rmscope.studies.edit.gate import read_concepts
from rmscope.studies.edit.patch import EditPatch, FeatureEdit
from rmscope.studies.edit.result import BeforeAfter, CueChoice, EditResult
from rmscope.studies.edit.settings import EditConfig


@dataclass(frozen=True, slots=True)
class CueEdit:
    """A cue, the edit chosen for it, and the fitting twins of each site on which it was chosen."""

    cue: str
    choice: Choice
    twins: Mapping[str, Sequence[Twin]]

    def row(self) -> CueChoice:
        return CueChoice(self.cue, **asdict(self.choice.edit), left=self.choice.left, loss=self.choice.loss)


def analyse(run: Run, config: EditConfig) -> EditResult:
    """Suppresses, clamps or damps features of a run's SAEs. The SAE's error stays.

    1. Check the settings, and read the cues.
    2. Make the edits: from the named features, or for each cue by rule (``choice.py``).
    3. Write the patch to ``out``, and with ``export`` the folder for plain transformers.
    4. With ``check``: measure cues, pairs and RM-Bench before and after (``mending.py``).

    Raises:
        InputError: the settings do not fit together, name an unknown site, feature or cue, or no feature fires on a cue.
    """
    started = time.time()
    # 1. Settings and cues
    _check_settings(config)
    plants = read_concepts(config.concepts)
    if config.site is not None:
        run.check_site(config.site)
    # 2. Edits
    chosen: list[CueEdit] = []
    if config.cue:
        chosen = _edits_of_cues(run, config.site, _plants_named(plants, config.cue))
        edits = join_edits([c.choice.edit for c in chosen])
    else:
        edits = (_named_edit(config),)
    # 3. Patch
    used = {e.site: run.saes[e.site] for e in edits}
    patch = EditPatch(edits, used, run.rm.identity, run.config.model)
    patch.save(config.out)
    if config.export is not None:
        export(run.rm, patch, config.export)
    # 4. Before and after
    figures = _before_after(run, patch, plants, chosen, config) if config.check else None
    return EditResult(
        model=run.config.model,
        patch=config.out,
        export=config.export,
        edits=list(edits),
        chosen=[c.row() for c in chosen],
        check=figures,
        seconds=round(time.time() - started, 1),
    )


def _check_settings(config: EditConfig) -> None:
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
    assert config.features
    features = tuple(config.features)
    if config.clamp is not None:
        return FeatureEdit(config.site, features, "clamp", config.clamp)
    if config.damp is not None:
        return FeatureEdit(config.site, features, "damp", config.damp)
    return FeatureEdit(config.site, features)


def _plants_named(plants: Sequence[Plant], names: Sequence[str]) -> list[Plant]:
    known = {p.name: p for p in plants}
    if missing := [n for n in names if n not in known]:
        raise InputError(f"There is no cue {missing[0]}; known are {', '.join(known)}.")
    return [known[n] for n in dict.fromkeys(names)]


def _edits_of_cues(run: Run, site: str | None, plants: Sequence[Plant]) -> list[CueEdit]:
    """The best edit of each cue over all sites (or at ``site``), chosen on prompts of the fit split."""
    saes = run.saes if site is None else {site: run.saes[site]}
    chosen = []
    for plant in plants:
        with run.display.stage(plant.name) as progress:
            prepared = fitting_twins(run.rm, saes, plant, run.config.seed, progress)
            chosen.append(CueEdit(plant.name, choose(run.rm, saes, prepared, progress)[0], prepared))
    return chosen


def _before_after(
    run: Run, patch: EditPatch, plants: Sequence[Plant], chosen: Sequence[CueEdit], config: EditConfig
) -> BeforeAfter:
    variants = check.edit_variants(run, patch, [c.twins for c in chosen])
    sets = check.own_pairs(run)
    if config.pairs is not None:
        sets[config.pairs] = load_pairs(config.pairs, limit=config.limit)
    bench = load_pairs(config.rm_bench) if config.rm_bench is not None else []
    with run.display.stage("check") as progress:
        return check.before_after(run, variants, plants, sets, bench, progress)
