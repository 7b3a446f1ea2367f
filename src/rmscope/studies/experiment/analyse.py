"""A hypothesis as a controlled experiment: paired effects of conditions, with and without ablation, and a verdict.

Every prompt sees every condition. An effect is the reward under a condition minus the reward under the condition that it is
held against, on the same prompt. With ablation, both texts lose the same features, exactly, from the response's first token
to the read position. Features chosen by rule are chosen on every other prompt and measured on the rest. Their controls are
chosen by the same rule, on the same prompts, from other features, but at the site of the chosen features alone. Named
features have controls that are drawn at random.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from rmscope.effects.completions import Completion, ablation_effects, active_on, complete
from rmscope.errors import InputError
from rmscope.evaluation.selection import distinct_sets, match_by_traits
from rmscope.io import Display, NoDisplay, Progress, silent, write_json, write_table
from rmscope.model.reward_model import RewardModel
from rmscope.run.inputs import Inputs
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.statistics import Array
from rmscope.studies.experiment import result as results
from rmscope.studies.experiment.conditions import Base, Experiment, bases_of, read_experiment
from rmscope.studies.experiment.result import AblatedFeature, AblatedFeatures, ExperimentResult, Measurements
from rmscope.studies.experiment.settings import ExperimentConfig

SD_PAIRS = 128
"""Without a run, SD(Δr) is taken over this many pairs of the data."""
CONTROLS, SMALLEST_SHARE = 8, 0.01
"""Matched controls, at most: sets of as many other features (:func:`choose_controls`); the share of an effect that a chosen
feature takes back alone, at least."""
Sites = Mapping[str, tuple[Sae, pl.DataFrame]]
"""By site: the SAE, and its reported features, with the columns feature and mean_effect."""
Runs = Sequence[Sequence[Completion]]
"""By prompt: the clean runs of a condition and of its baseline."""


@dataclass(frozen=True, slots=True)
class Trial:
    """An experiment on a PM, its prompts with their base responses, and the texts of a prompt under some conditions."""

    rm: RewardModel
    experiment: Experiment
    bases: Sequence[Base]

    def texts(self, number: int, names: Sequence[str]) -> list[str]:
        return [self.experiment.conditions[name].text(self.bases, number) for name in names]


@dataclass(frozen=True, slots=True)
class AblationSet:
    """Groups of features of a site's SAE: those that an experiment ablates, and then their matched controls."""

    features: AblatedFeatures
    sae: Sae
    groups: list[list[int]]


def analyse(config: ExperimentConfig, display: Display | None = None, run: Run | None = None) -> ExperimentResult:
    """Runs an experiment on an open ``run`` or on what the settings name, and writes its table, figures and page.

    1. Read the experiment file.
    2. Open the run, or else the PM and the pairs.
    3. Load the run's SAEs and reported features, where the experiment ablates.
    4. Make the base texts, from prompts of the measure split or from the file's own; take SD(Δr).
    5. Choose features and measure all conditions (:func:`run_experiment`).
    6. Write ``NAME.parquet``, ``NAME.json`` and ``NAME.html``.

    Raises:
        InputError: the file is wrong, there is neither a run nor a PM, the run is not finished, it has no SAE or no feature
            that the file names, or there are fewer than two prompts.
    """
    started, experiment, sites = time.time(), read_experiment(config.file), dict[str, tuple[Sae, pl.DataFrame]]()  # 1
    if run is None and config.run is not None:  # 2
        run = Run.open(config.run, display, config.trust_remote_code)
    if run is not None:
        inputs, shown, pairs, sd = run.inputs, display or run.display, run.pair_set, run.sd
        if rule := experiment.ablate:  # 3
            names = [run.check_site(rule.site)] if rule.site else run.sites
            sites = {site: (run.saes[site], run.reported(site)) for site in names}
    elif config.model is not None:
        inputs, shown = Inputs.of(config.model, config.data, config), display or NoDisplay()
        pairs = inputs.scored
        with shown.stage("score") as progress:
            sd = float(inputs.rm.score_tokens(pairs.tokens[:SD_PAIRS], progress).delta.std())
    else:
        raise InputError("There is nothing to measure on; name a run folder with --run, or a PM with --model.")
    bases = bases_of(experiment, [pairs.pairs[i] for i in pairs.of_split("measure")])  # 4
    with shown.stage("measure") as progress:  # 5
        result = run_experiment(Trial(inputs.rm, experiment, bases), sd, sites, inputs.config.seed, progress)
    if run is not None and result.ablated is not None:
        for row in result.ablated.features:
            row.tokens = run.top_tokens(result.ablated.site, row.feature)
    result.model, result.data, result.seconds = inputs.config.model, inputs.config.data, round(time.time() - started, 1)
    result.folder = config.out or (run.folder / "evidence" / "experiments" if run is not None else Path("experiments"))
    write_table(result.folder / f"{result.name}.parquet", result.table)  # 6
    write_json(result.folder / f"{result.name}.json", result.as_json())
    result.page().save()
    return result


def run_experiment(trial: Trial, sd: float, sites: Sites, seed: int = 0, progress: Progress = silent) -> ExperimentResult:
    """The experiment on given texts; nothing is written. ``sd`` is SD(Δr) of the PM's data, the unit of what counts.

    1. Choose the features to ablate, on every other prompt. Without ``sites`` nothing is ablated.
    2. Measure every condition on the other prompts (on all, where no features are chosen).
    3. Test the claims.
    """
    experiment, numbers, ablated = trial.experiment, range(len(trial.bases)), None
    if experiment.ablate is not None and sites:  # 1
        fitting, numbers = (numbers[::2], numbers[1::2]) if experiment.ablate.carrying else (numbers, numbers)
        ablated = choose_features(trial, fitting, sites, seed, progress)
    measured = measure_conditions(trial, numbers, ablated, progress)  # 2
    claims = results.judge_claims(results.make_claims(measured, sd), len(numbers), seed)  # 3
    verdict, by_features = results.both_verdicts(claims)
    return ExperimentResult(
        **experiment.model_dump(include={"name", "hypothesis"}),
        verdict=verdict,
        by_features=by_features,
        test=f"paired sign-flip permutation test by prompt against {results.BOUND} SD(Δr), Holm over {len(claims)} claims",
        prompts=len(numbers),
        chosen_on=len(trial.bases) - len(numbers),
        sd=sd,
        bound=results.BOUND * sd,
        conditions=[results.condition_figures(measured, name, sd) for name in experiment.conditions],
        claims=claims,
        ablated=ablated.features if ablated else None,
        example=trial.bases[numbers[0]].prompt[-1]["content"],
        table=measured.table,
    )


def choose_features(trial: Trial, fitting: Sequence[int], sites: Sites, seed: int, progress: Progress) -> AblationSet:
    """The features to ablate and their matched controls, from the prompts ``fitting`` alone.

    Features that the experiment names are taken as they are. Otherwise, at each site:

    1. Take the reported features whose ablation effect has the sign of the condition's effect, and that fire more under the
       condition than under its baseline.
    2. Ablate each exactly; keep those that take back at least :data:`SMALLEST_SHARE`, the largest first.
    3. Ablate them together. The site where they take back most is used, and controls are chosen there.
    """
    rm, experiment, rule = trial.rm, trial.experiment, trial.experiment.ablate
    assert rule is not None
    if rule.site and (m := sites[rule.site][0].m) <= max(rule.features, default=0):
        raise InputError(f"The SAE at {rule.site} has {m} features, from 0; mend ablate.features.")
    focus = rule.carrying or next(n for n in experiment.conditions if n in experiment.expects.names())
    runs = []
    for done, i in enumerate(fitting):
        texts = trial.texts(i, (focus, experiment.against(focus)))
        runs.append(complete(rm, trial.bases[i].prompt, texts, list(sites)))
        progress(done + 1, len(fitting), "prompts on which features are chosen")
    effect = sum(a.reward - b.reward for a, b in runs)
    choices: list[tuple[float, Fitting, list[int], dict[int, float]]] = []
    for site, (sae, reported) in sites.items():
        fitting_at, features, alone = Fitting(rm, sae, site, runs, effect), rule.features, dict[int, float]()
        if rule.carrying:
            means, more = _means(reported), fitting_at.fires_more
            eligible = [j for j, mean in means.items() if mean * effect > 0 and more[j]]
            alone = fitting_at.alone(eligible)
            features = sorted((j for j in eligible if alone[j] >= SMALLEST_SHARE), key=lambda j: -alone[j])[: rule.count]
        choices.append((fitting_at.shares([features])[0], fitting_at, features, alone))
    _, best, features, alone = max(choices, key=lambda choice: choice[0])
    controls = choose_controls(best, features, alone, seed) if features else []
    means = _means(sites[best.site][1])
    ablated = AblatedFeatures(best.site, rule.carrying, [AblatedFeature(j, means.get(j)) for j in features], len(controls))
    return AblationSet(ablated, best.sae, [features, *controls])


def _means(reported: pl.DataFrame) -> dict[int, float]:
    return dict(reported.select("feature", "mean_effect").iter_rows())


def choose_controls(fitting: Fitting, features: Sequence[int], alone: Mapping[int, float], seed: int) -> list[list[int]]:
    """At most :data:`CONTROLS` sets of other features, as many as ``features``; each set counts once.

    ``alone`` has the share that each eligible feature takes back alone. The features that were chosen are those of them that
    take back most, so their controls are chosen in the same way. A pool has one feature for each eligible one, which matches
    it in firing and mass, fires more under the condition and is not eligible: what was passed over would make the pool
    weaker than the features that were chosen from. Where ``alone`` is empty the features were named, and each control is a
    random draw of features that match them.
    """
    fires, mass = fitting.profile
    free = mass.sum(1) > 0
    if alone:
        free &= fitting.fires_more
    traits = np.concatenate([fires + 1.0, mass.sum(1, keepdims=True) + 1e-9], 1)
    like = [*features, *(j for j in alone if j not in features)]
    pools = [match_by_traits(traits, free, like, like, s).tolist() for s in range(seed, seed + CONTROLS)]
    if not alone:
        return distinct_sets(pools)
    known = fitting.alone(sorted({j for pool in pools for j in pool}))
    return distinct_sets(sorted(pool, key=lambda j: -known[j])[: len(features)] for pool in pools)


@dataclass(frozen=True)
class Fitting:
    """A site's SAE on the clean runs of the prompts on which features are chosen; ``effect`` is the condition's, summed."""

    rm: RewardModel
    sae: Sae
    site: str
    runs: Runs
    effect: float

    def shares(self, groups: Sequence[Sequence[int]]) -> list[float]:
        """The share of the effect that each group's ablation takes back; 0 where there is no effect."""
        taken = np.zeros(len(groups))
        for run in self.runs:
            of, against = (ablation_effects(self.rm, self.sae, self.site, t, groups).double().numpy() for t in run)
            taken += of - against
        return (taken / self.effect).tolist() if self.effect else [0.0] * len(groups)

    def alone(self, features: Sequence[int]) -> dict[int, float]:
        """The share that each feature takes back alone."""
        return dict(zip(features, self.shares([[j] for j in features]), strict=True))

    @property
    def fires_more(self) -> Bool[Array, " m"]:
        """Whether each feature has more mass under the condition than under its baseline."""
        _, mass = self.profile
        return mass[:, 0] > mass[:, 1]

    @cached_property
    def profile(self) -> tuple[Float[Array, "m two"], Float[Array, "m two"]]:
        """Per feature and condition: the number of texts in which it fires, and its mean Σ_t f_tj |d_j|."""
        fires, mass, norms = np.zeros((self.sae.m, 2)), np.zeros((self.sae.m, 2)), self.sae.W_dec.norm(dim=1)
        for run in self.runs:
            for column, text in enumerate(run):
                active = active_on(self.sae, self.site, text)
                fires[active.feature.unique().numpy(), column] += 1
                np.add.at(mass[:, column], active.feature.numpy(), (active.value * norms[active.feature]).numpy())
        return fires, mass / max(1, len(self.runs))


def measure_conditions(
    trial: Trial, numbers: Sequence[int], ablated: AblationSet | None, progress: Progress
) -> Measurements:
    """All conditions on the prompts ``numbers``, as they are and with the features ablated; with matched controls ablated
    only where ablation is expected to take something back."""
    experiment, names, groups = trial.experiment, list(trial.experiment.conditions), ablated.groups if ablated else []
    with_controls = {n for name in experiment.expects.taken_back for n in (name, experiment.against(name))}
    rows, without = [], np.full((len(numbers), len(names), len(groups)), np.nan)
    for done, number in enumerate(numbers):
        prompt, texts = trial.bases[number].prompt, trial.texts(number, names)
        runs = complete(trial.rm, prompt, texts, [ablated.features.site] if ablated else [])
        for name, text, run, left in zip(names, texts, runs, without[done], strict=True):
            if ablated:
                wanted = groups if name in with_controls else groups[:1]
                effects = ablation_effects(trial.rm, ablated.sae, ablated.features.site, run, wanted).numpy()
                left[: len(wanted)] = run.reward - effects
            start = (prompt[-1]["content"], name, experiment.against(name), text, run.ids.numel() - run.start, run.reward)
            rows.append((*start, float(left[0]) if ablated else None))
        progress(done + 1, len(numbers), "prompts under all conditions")
    columns = ["prompt", "condition", "against", "text", "tokens", "reward", "without"]
    types = {"tokens": pl.Int32, "without": pl.Float64}
    return Measurements(experiment, pl.DataFrame(rows, columns, schema_overrides=types, orient="row"), without)
