"""SAEs side by side on held-out pairs: sparsity, reconstruction, and the reward that survives their splice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rmscope.errors import InputError
from rmscope.evaluation.explained import Explained, FrozenSelection, SelectSplit, explain
from rmscope.evaluation.reconstruction import Evaluation, as_table, evaluate
from rmscope.io import Display, NoDisplay, write_json, write_table
from rmscope.model.reward_model import RewardModel
from rmscope.run.evidence import Histogram
from rmscope.run.inputs import Inputs
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.studies.evaluate.result import EvaluateResult, SaeEvaluation
from rmscope.studies.evaluate.settings import EvaluateConfig

BINS = 24
"""Bars of the histogram of firing rates."""


def analyse(config: EvaluateConfig, display: Display | None = None, run: Run | None = None) -> EvaluateResult:
    """Evaluates a run's SAEs, brought ones, or both; ``run`` is the run where it is open already.

    1. The PM and the pairs are opened: a run's measure split, or the pairs of ``data``.
    2. The SAEs are loaded and checked against the PM.
    3. Every SAE is evaluated on the same pairs, one per prompt while prompts last.
    4. With ``out`` the table and the page are written.
    5. With ``curves`` the run's SAEs also get keep K and ablate K, stored in the run for its report.

    Raises:
        InputError: there is no PM, no pair or no SAE, an SAE does not fit the PM, or ``curves`` has no run.
    """
    display = display or (run.display if run is not None else NoDisplay())
    if run is None and config.run is not None:
        run = Run.open(config.run, display)
    if config.curves and run is None:
        raise InputError("Curves need a run folder, whose fit split chooses the features; name one.")
    inputs = run.inputs if run is not None else _inputs(config)

    saes = _run_saes(run) if run is not None else {}
    saes |= load_saes(config.sae, config.site)
    _check(saes, inputs.rm)

    pairs = run.pair_set if run is not None else inputs.scored
    candidates = pairs.of_split("measure") if run is not None else range(len(pairs.pairs))
    places = pairs.one_per_prompt(candidates, config.limit)
    prompts = [pairs.pairs[i].prompt_key for i in places]
    with display.stage("evaluate") as progress:
        evaluations = evaluate(inputs.rm, saes, [pairs.tokens[i] for i in places], prompts, progress)

    result = EvaluateResult(
        model=inputs.config.model,
        data=inputs.config.data,
        pairs=len(places),
        prompts=len(set(prompts)),
        tokens=evaluations[0].tokens,
        saes=[_sae_evaluation(e) for e in evaluations],
        run=run.folder if run is not None else None,
        table=as_table(evaluations),
        path=config.out / "evaluation.html" if config.out is not None else None,
    )
    if config.out is not None:
        write_table(config.out / "evaluation.parquet", result.table)
        result.show().save()

    if config.curves and run is not None:
        result.explained = [_explain(run, site, places, prompts, display) for site in run.sites]
    return result


def _inputs(config: EvaluateConfig) -> Inputs:
    if config.model is None or config.data is None:
        raise InputError("There is nothing to measure on; name a run folder, or both --model and --data.")
    return Inputs.of(config.model, config.data, config)


def _run_saes(run: Run) -> dict[str, Sae]:
    """The run's SAEs by site; each belongs to the site at which the run uses it, whatever its file says."""
    for site, sae in run.saes.items():
        sae.site = site
    return dict(run.saes)


def load_saes(sources: Sequence[str | Path], site: str | None) -> dict[str, Sae]:
    """SAEs by the path from which they are loaded; a folder of SAEs stands for those in its subfolders.

    ``site`` is that of SAEs that name none.

    Raises:
        InputError: an SAE cannot be read, or has no site.
    """
    saes: dict[str, Sae] = {}
    for source in map(Path, sources):
        inside = [] if (source / "cfg.json").exists() else sorted(p.parent for p in source.glob("*/cfg.json"))
        for path in inside or [source]:
            sae = Sae.load(path)
            sae.site = sae.site or site or ""
            if not sae.site:
                raise InputError(f"The SAE at {path} does not say which site it was trained on; pass --site.")
            saes[str(path)] = sae
    return saes


def _check(saes: Mapping[str, Sae], rm: RewardModel) -> None:
    if not saes:
        raise InputError("There is no SAE to evaluate; name a run folder, or --sae DIR (several times to compare).")
    for name, sae in saes.items():
        rm.site_index(sae.site)
        if sae.d != rm.d_model:
            raise InputError(
                f"The SAE at {name} reads {sae.d} dimensions, the PM's stream has {rm.d_model}; "
                "name an SAE that was trained on this PM."
            )


def _sae_evaluation(e: Evaluation) -> SaeEvaluation:
    rarity = -np.log10(e.density[e.density > 0])
    counts, edges = np.histogram(rarity, BINS, (0, np.log10(e.tokens) + 1e-9))
    return SaeEvaluation(
        name=e.name,
        site=e.site,
        architecture=e.architecture,
        m=e.m,
        figures=e.figures,
        dead=e.dead,
        points=list(zip(e.delta.tolist(), e.delta_hat.tolist(), strict=True)),
        rarity=Histogram(edges=edges.tolist(), counts=counts.tolist()),
    )


def _explain(run: Run, site: str, places: Sequence[int], prompts: Sequence[str], display: Display) -> Explained:
    """Writes ``effects/SITE/explained.json``: the list comes from the fit split, the figures from the given pairs."""
    fit = run.of_split("fit")
    select = SelectSplit(run.store, [run.tokens[i] for i in fit], [run.pairs[i].prompt_key for i in fit], range(len(fit)))
    with display.stage(site) as progress:
        selection = FrozenSelection(run.rm, site, run.saes[site], select, prompts, progress)
        explained = explain(run.rm, site, selection, [run.tokens[i] for i in places], prompts, progress)
    write_json(run.folder / "effects" / site / "explained.json", explained.as_dict())
    return explained
