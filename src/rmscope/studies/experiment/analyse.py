"""A hypothesis as a controlled experiment: paired effects of conditions, with and without ablation, and a verdict.

Every prompt sees every condition. An effect is the reward under a condition minus the reward under the condition that it is
held against, on the same prompt. With ablation, both texts lose the same features, exactly, from the response's first token
to the read position (docs/method.md, "Effects"). Features found by rule are chosen on every other prompt and measured on
the rest, beside matched controls. ``verdict.py`` tests what the experiment expects.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from rmscope.errors import InputError
from rmscope.io import Display, NoDisplay, Progress, silent, write_json, write_table
from rmscope.model.reward_model import RewardModel
from rmscope.run.inputs import Inputs
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.statistics import interval
from rmscope.studies.experiment.conditions import Ablate, Base, Experiment, bases_of, read_experiment
from rmscope.studies.experiment.features import AblationSet, choose_features, measure_conditions
from rmscope.studies.experiment.result import AblatedFeature, AblatedFeatures, ConditionFigures, ExperimentResult
from rmscope.studies.experiment.settings import ExperimentConfig
from rmscope.studies.experiment.verdict import BOUND, Measurements, both_verdicts, judge_claims, make_claims, taken_back

SD_PAIRS = 128
"""Without a run, SD(Δr) is taken over this many pairs of the data."""


def analyse(config: ExperimentConfig, display: Display | None = None, run: Run | None = None) -> ExperimentResult:
    """Runs an experiment, and writes its table, figures and page.

    1. Read the experiment file.
    2. Open the run, or else the PM and the pairs.
    3. Load the run's SAEs and reported features, where the experiment ablates.
    4. Make the base texts, from prompts of the measure split or from the file's own; take SD(Δr).
    5. Choose features and measure all conditions (:func:`run_experiment`).
    6. Write ``NAME.parquet``, ``NAME.json`` and ``NAME.html``.

    Args:
        run: an open run, in place of the folder ``config.run``.

    Raises:
        InputError: the file is wrong, there is neither a run nor a PM, the run is not finished, it has no SAE or no feature
            that the file names, or there are fewer than two prompts.
    """
    experiment, started = read_experiment(config.file), time.time()  # 1
    if run is None and config.run is not None:  # 2
        run = Run.open(config.run, display)
    inputs = run.inputs if run is not None else _inputs(config)
    shown = display or (run.display if run is not None else NoDisplay())
    saes, reported = _features(run, experiment.ablate) if run is not None and experiment.ablate else ({}, {})  # 3
    pairs = run.pair_set if run is not None else inputs.scored  # 4
    bases = bases_of(experiment, [pairs.pairs[i] for i in pairs.of_split("measure")])
    sd = run.sd if run is not None else _sd(inputs, shown)
    with shown.stage("measure") as progress:  # 5
        result = run_experiment(inputs.rm, experiment, bases, sd, saes, reported, inputs.config.seed, progress)
    result.model, result.data = inputs.config.model, inputs.config.data
    if run is not None and result.ablated is not None:
        result.ablated = _with_tokens(run, result.ablated)
    result.seconds = round(time.time() - started, 1)
    own = run.folder / "evidence" / "experiments" if run is not None else Path("experiments")  # 6
    result.folder = config.out or own
    write_table(result.folder / f"{result.name}.parquet", result.table)
    write_json(result.folder / f"{result.name}.json", result.as_json())
    result.page().save()
    return result


def _inputs(config: ExperimentConfig) -> Inputs:
    if config.model is None:
        raise InputError("There is nothing to measure on; name a run folder with --run, or a PM with --model.")
    return Inputs.of(config.model, config.data, config)


def _sd(inputs: Inputs, display: Display) -> float:
    with display.stage("score") as progress:
        return float(inputs.rm.score_tokens(inputs.scored.tokens[:SD_PAIRS], progress).delta.std())


def _features(run: Run, rule: Ablate) -> tuple[dict[str, Sae], dict[str, pl.DataFrame]]:
    """The run's SAEs and reported features by site. InputError where the run lacks what the rule names."""
    if rule.site is not None:
        run.check_site(rule.site)
    reported = {site: run.reported(site) for site in run.sites}
    if rule.site is not None and (m := run.saes[rule.site].m) <= max(rule.features, default=0):
        raise InputError(f"The SAE at {rule.site} has {m} features, from 0; mend ablate.features.")
    return run.saes, reported


def _with_tokens(run: Run, ablated: AblatedFeatures) -> AblatedFeatures:
    rows = [replace(row, tokens=run.top_tokens(ablated.site, row.feature)) for row in ablated.features]
    return replace(ablated, features=rows)


def run_experiment(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    sd: float,
    saes: Mapping[str, Sae] | None = None,
    reported: Mapping[str, pl.DataFrame] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ExperimentResult:
    """The experiment on given texts; nothing is written.

    1. Choose the features to ablate, on every other prompt.
    2. Measure every condition on the other prompts (on all, where no features are chosen).
    3. Test the claims.

    Args:
        bases: prompts with their base responses (:func:`~rmscope.studies.experiment.conditions.bases_of`).
        sd: SD(Δr) of the PM's data, the unit of what counts.
        saes: by site; without them nothing is ablated, and no claim on ablation is tested.
        reported: by site the reported features, with the columns feature and mean_effect.
    """
    numbers, ablated = list(range(len(bases))), None
    if experiment.ablate is not None and saes:
        fitting = numbers[::2] if experiment.ablate.carrying else numbers
        ablated = choose_features(rm, experiment, bases, fitting, saes, reported or {}, seed, progress)
        numbers = numbers[1::2] if experiment.ablate.carrying else numbers
    sae = saes[ablated.site] if ablated and saes else None
    measured = measure_conditions(rm, experiment, bases, numbers, ablated, sae, progress)
    claims = judge_claims(make_claims(experiment, measured, sd, ablated is not None), len(numbers), seed)
    verdict, by_features = both_verdicts(claims)
    return ExperimentResult(
        name=experiment.name,
        hypothesis=experiment.hypothesis,
        verdict=verdict,
        by_features=by_features,
        test=f"paired sign-flip permutation test by prompt against {BOUND} SD(Δr), Holm over {len(claims)} claims",
        prompts=len(numbers),
        chosen_on=len(bases) - len(numbers),
        sd=sd,
        bound=BOUND * sd,
        conditions=[_condition(experiment, measured, name, sd) for name in experiment.conditions],
        claims=claims,
        ablated=_ablated(experiment, ablated, reported or {}) if ablated else None,
        example=bases[numbers[0]].prompt[-1]["content"],
        table=as_table(experiment, bases, measured),
    )


def _condition(experiment: Experiment, measured: Measurements, name: str, sd: float) -> ConditionFigures:
    against, column = experiment.against(name), measured.conditions.index(name)
    figures = ConditionFigures(
        name=name,
        against=None if against == name else against,
        text=measured.texts[0][column],
        tokens=float(measured.tokens[:, column].mean()),
        reward=float(measured.rewards[:, column].mean()),
    )
    if against == name:
        return figures
    whole = measured.effect(experiment, name)
    figures = replace(figures, effect=interval(whole, unit="reward"), effect_sd=float(whole.mean()) / sd)
    if not measured.without.shape[2]:
        return figures
    left = measured.effect(experiment, name, 0)
    return replace(figures, without=interval(left, unit="reward"), taken_back=taken_back(whole, left))


def _ablated(experiment: Experiment, ablated: AblationSet, reported: Mapping[str, pl.DataFrame]) -> AblatedFeatures:
    table = reported.get(ablated.site)
    means: dict[int, float] = dict(table.select("feature", "mean_effect").iter_rows()) if table is not None else {}
    features = [AblatedFeature(j, means.get(j)) for j in ablated.features]
    rule = experiment.ablate.carrying if experiment.ablate else None
    return AblatedFeatures(ablated.site, rule, features, len(ablated.controls))


def as_table(experiment: Experiment, bases: Sequence[Base], measured: Measurements) -> pl.DataFrame:
    """One row per prompt and condition: prompt, condition, against, text, tokens, reward, without (null: not ablated)."""
    rows = [
        (
            bases[number].prompt[-1]["content"],
            name,
            experiment.against(name),
            measured.texts[i][j],
            int(measured.tokens[i, j]),
            float(measured.rewards[i, j]),
            float(measured.without[i, j, 0]) if measured.without.shape[2] else None,
        )
        for i, number in enumerate(measured.numbers)
        for j, name in enumerate(measured.conditions)
    ]
    schema = {
        "prompt": pl.String, "condition": pl.String, "against": pl.String, "text": pl.String, "tokens": pl.Int32,
        "reward": pl.Float64, "without": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")
