"""SAEs side by side on held-out pairs: sparsity, reconstruction, and the reward that survives their splice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmscope.errors import InputError
from rmscope.evaluation.explained import FrozenSelection, SelectSplit, explain
from rmscope.evaluation.reconstruction import evaluate
from rmscope.io import Display, NoDisplay, write_json, write_table
from rmscope.run.inputs import Inputs
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.sae.fit import MEND, Fit, stated_figures
from rmscope.studies.evaluate.result import EvaluateResult
from rmscope.studies.evaluate.settings import EvaluateConfig


def analyse(config: EvaluateConfig, display: Display | None = None, run: Run | None = None) -> EvaluateResult:
    """Evaluates a run's SAEs, brought ones, or both; ``run`` is the run where it is open already.

    1. The PM and the pairs are opened: a run's measure split, or the pairs of ``data``.
    2. The SAEs are loaded and checked against the PM.
    3. Every SAE is evaluated on the same pairs, one per prompt while prompts last.
    4. With ``out`` the table and the page are written.
    5. With ``curves`` the run's SAEs also get keep K and ablate K of lists from the fit split, stored for its report.

    Raises:
        InputError: there is no PM, no pair or no SAE, an SAE does not fit the PM, or ``curves`` has no run.
    """
    display = display or (run.display if run is not None else NoDisplay())
    if run is None and config.run is not None:
        run = Run.open(config.run, display, config.trust_remote_code)
    if config.curves and run is None:
        raise InputError("Curves need a run folder, whose fit split chooses the features; name one.")
    saes: dict[str, Sae] = {}
    if run is not None:
        inputs, saes = run.inputs, dict(run.saes)
    elif config.model is not None and config.data is not None:
        inputs = Inputs.of(config.model, config.data, config)
    else:
        raise InputError("There is nothing to measure on; name a run folder, or both --model and --data.")

    for site, sae in saes.items():
        sae.site = site  # where the run uses it, whatever its file says
    saes |= load_saes(config.sae, config.site)
    if not saes:
        raise InputError("There is no SAE to evaluate; name a run folder, or --sae DIR (several times to compare).")
    for name, sae in saes.items():
        inputs.rm.site_index(sae.site)
        if sae.width != inputs.rm.d_model:
            problem = f"The SAE at {name} reads {sae.width} dimensions, the PM's stream has {inputs.rm.d_model}"
            raise InputError(f"{problem}; name an SAE that was trained on this PM.")

    pairs = run.pair_set.only(run.of_split("measure")) if run is not None else inputs.scored
    measured = pairs.only(pairs.one_per_prompt(range(len(pairs.pairs)), config.limit))
    prompts = [p.prompt_key for p in measured.pairs]
    with display.stage("evaluate") as progress:
        evaluations = evaluate(inputs.rm, saes, measured.tokens, prompts, progress)
    for e in evaluations:
        fvu, l0 = e.figures["fvu"].value, e.figures["l0"].value
        if fvu is None or l0 is None:
            continue
        on_pairs = Fit(e.tokens, fvu, None, l0, e.dead, *stated_figures(saes[e.name]))
        if doubts := on_pairs.doubts():
            display.note(f"{e.name}: {'; '.join(doubts)} ({on_pairs.figures()}); {MEND}.")

    result = EvaluateResult(
        model=inputs.config.model,
        data=inputs.config.data,
        pairs=len(prompts),
        prompts=len(set(prompts)),
        tokens=evaluations[0].tokens,
        saes=evaluations,
        run=run.folder if run is not None else None,
        path=config.out / "evaluation.html" if config.out is not None else None,
    )
    if config.out is not None:
        write_table(config.out / "evaluation.parquet", result.table)
        result.show().save()

    if config.curves and run is not None:
        stored = run.pair_set.only(run.of_split("fit"))
        select = SelectSplit(run.store, stored.tokens, [p.prompt_key for p in stored.pairs], range(len(stored.pairs)))
        for site in run.sites:
            with display.stage(site) as progress:
                selection = FrozenSelection(run.rm, site, run.saes[site], select, prompts, progress)
                explained = explain(selection, measured.tokens, prompts, progress)
            write_json(run.folder / "effects" / site / "explained.json", explained.as_dict())
            result.explained.append(explained)
    return result


def load_saes(sources: Sequence[str | Path], site: str | None) -> dict[str, Sae]:
    """SAEs by the path from which they are loaded; a folder of SAEs stands for those in its subfolders. ``site`` is that of
    SAEs that name none. InputError where an SAE cannot be read or has no site."""
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
