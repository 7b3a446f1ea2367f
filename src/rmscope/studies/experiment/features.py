"""The features that an experiment ablates, chosen on some prompts, and its measurement on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Float

from rmscope.effects.completions import Completion, ablation_effects, active_on, complete
from rmscope.evaluation.controls import match_by_traits
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array
from rmscope.studies.experiment.conditions import Base, Experiment
from rmscope.studies.experiment.verdict import Measurements

CONTROLS = 8
"""Matched controls: sets of other features, as many, that fire as often and as strongly."""
SMALLEST_SHARE = 0.01
"""The share of the effect that a feature must take back alone to be chosen."""


@dataclass(frozen=True, slots=True)
class AblationSet:
    """The features that an experiment ablates at a site, and their matched controls."""

    site: str
    features: list[int]
    controls: list[list[int]] = field(default_factory=list)

    @property
    def groups(self) -> list[list[int]]:
        return [self.features, *self.controls]


def choose_features(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    fitting: Sequence[int],
    saes: Mapping[str, Sae],
    reported: Mapping[str, pl.DataFrame],
    seed: int,
    progress: Progress = silent,
) -> AblationSet:
    """The features to ablate and their matched controls, from the prompts ``fitting`` alone.

    Features that the experiment names are taken as they are. Otherwise, at each site:

    1. Take the reported features whose ablation effect has the sign of the condition's effect, and that fire more under the
       condition than under its baseline.
    2. Ablate each exactly; keep those that take back at least :data:`SMALLEST_SHARE`, the largest first.
    3. Ablate them together. The site where they take back most is used.
    """
    rule = experiment.ablate
    assert rule is not None
    sites = [rule.site] if rule.site else list(saes)
    focus = rule.carrying or next(n for n in experiment.conditions if n in experiment.expects.names())
    pair = [experiment.conditions[name] for name in (focus, experiment.against(focus))]
    runs = []
    for done, i in enumerate(fitting):
        runs.append(complete(rm, bases[i].prompt, [c.text(bases, i) for c in pair], sites))
        progress(done + 1, len(fitting), "prompts on which features are chosen")
    effect = sum(a.reward - b.reward for a, b in runs)
    candidates: list[tuple[float, AblationSet]] = []
    for site in sites:
        sae = saes[site]
        fires, mass = _profile(sae, site, runs)
        features = rule.features
        if rule.carrying:
            more = mass[:, 0] - mass[:, 1]
            effects = reported[site].select("feature", "mean_effect").iter_rows()
            eligible = [j for j, mean in effects if mean * effect > 0 and more[j] > 0]
            alone = dict(zip(eligible, _shares(rm, sae, site, runs, [[j] for j in eligible], effect), strict=True))
            features = sorted((j for j in eligible if alone[j] >= SMALLEST_SHARE), key=lambda j: -alone[j])[: rule.count]
        traits = np.concatenate([fires + 1.0, mass.sum(1, keepdims=True) + 1e-9], 1)
        free, sets = mass.sum(1) > 0, range(CONTROLS if features else 0)
        controls = [match_by_traits(traits, free, features, features, seed + i).tolist() for i in sets]
        (share,) = _shares(rm, sae, site, runs, [features], effect)
        candidates.append((share, AblationSet(site, features, controls)))
    return max(candidates, key=lambda item: item[0])[1]


def _shares(
    rm: RewardModel, sae: Sae, site: str, runs: Sequence[Sequence[Completion]], groups: Sequence[list[int]], effect: float
) -> list[float]:
    """The share of an effect that each group's ablation takes back; the effect is a sum over (condition, baseline)."""
    taken = np.zeros(len(groups))
    for run in runs:
        of, against = (ablation_effects(rm, sae, site, text, groups).double().numpy() for text in run)
        taken += of - against
    return (taken / effect).tolist() if effect else [0.0] * len(groups)


def _profile(
    sae: Sae, site: str, runs: Sequence[Sequence[Completion]]
) -> tuple[Float[Array, "m two"], Float[Array, "m two"]]:
    """Per feature and condition: the number of texts in which it fires, and its mean Σ_t f_tj |d_j|."""
    fires, mass = np.zeros((sae.m, 2)), np.zeros((sae.m, 2))
    norms = sae.W_dec.norm(dim=1)
    for run in runs:
        for column, text in enumerate(run):
            active = active_on(sae, site, text)
            fires[active.feature.unique().numpy(), column] += 1
            np.add.at(mass[:, column], active.feature.numpy(), (active.value * norms[active.feature]).numpy())
    return fires, mass / max(1, len(runs))


def measure_conditions(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    numbers: Sequence[int],
    ablated: AblationSet | None,
    sae: Sae | None,
    progress: Progress = silent,
) -> Measurements:
    """All conditions on the prompts ``numbers``, as they are and with the features ablated.

    Matched controls are ablated only for the conditions of which ablation is expected to take something back.
    """
    names, groups = list(experiment.conditions), ablated.groups if ablated else []
    with_controls = {n for name in experiment.expects.taken_back for n in (name, experiment.against(name))}
    rewards, tokens = np.zeros((len(numbers), len(names))), np.zeros((len(numbers), len(names)), dtype=int)
    without = np.full((len(numbers), len(names), len(groups)), np.nan)
    texts: list[list[str]] = []
    for row, number in enumerate(numbers):
        texts.append([experiment.conditions[name].text(bases, number) for name in names])
        for column, text in enumerate(complete(rm, bases[number].prompt, texts[-1], [ablated.site] if ablated else [])):
            rewards[row, column] = text.reward
            tokens[row, column] = text.ids.numel() - text.start
            if ablated and sae is not None:
                wanted = groups if names[column] in with_controls else groups[:1]
                effects = ablation_effects(rm, sae, ablated.site, text, wanted).numpy()
                without[row, column, : len(wanted)] = text.reward - effects
        progress(row + 1, len(numbers), "prompts under all conditions")
    return Measurements(list(numbers), names, texts, rewards, tokens, without)
