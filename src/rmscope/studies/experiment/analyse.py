"""A hypothesis about a feature as a controlled experiment: paired effects of conditions, with and without ablation.

Every prompt sees every condition. An effect is the reward under a condition minus the reward under the condition that
it is held against, on the same prompt; with ablation both arms lose the same features, exactly, from the response's first
token on (METHOD, "Ablation effect"). Features found by rule are chosen on every other prompt and measured on the rest,
beside :data:`CONTROLS` sets of other features that are alike them. The verdict is `verdict.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.completions import Completion, ablation_effects, active_on, complete
from rmscope.evaluation.controls import alike
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array
from rmscope.studies.experiment.conditions import Base, Experiment
from rmscope.studies.experiment.verdict import BOUND, Measurements, claims_of, judged, taken_back, verdicts, with_interval

CONTROLS = 8
"""Sets of features alike the ablated ones; what these take back stands beside."""
LEAST = 0.01
"""The share of the effect that a feature found by rule takes back alone, at least."""


@dataclass(frozen=True, slots=True)
class Ablated:
    """The features that an experiment ablates at a site, and sets of others that are alike them."""

    site: str
    features: list[int]
    controls: list[list[int]] = field(default_factory=list)

    @property
    def groups(self) -> list[list[int]]:
        return [self.features, *self.controls]


def run_experiment(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    sd: float,
    saes: Mapping[str, Sae] | None = None,
    reported: Mapping[str, pl.DataFrame] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The experiment's figures and verdict, and a row a prompt and condition.

    Args:
        bases: prompts with their base responses (:func:`~rmscope.studies.experiment.conditions.bases_of`).
        sd: SD(Δr) of the PM's data, the unit of what counts.
        saes: by site; without them nothing is ablated, and what the experiment expects of ablation is left out.
        reported: by site the reported features: feature, mean_effect.
    """
    numbers, ablated = list(range(len(bases))), None
    if experiment.ablate is not None and saes:
        fitting = numbers[::2] if experiment.ablate.carrying else numbers
        ablated = choose(rm, experiment, bases, fitting, saes, reported or {}, seed, progress)
        numbers = numbers[1::2] if experiment.ablate.carrying else numbers
    sae = saes[ablated.site] if ablated and saes else None
    arms = measure(rm, experiment, bases, numbers, ablated, sae, progress)
    claims = judged(claims_of(experiment, arms, sd, ablated is not None), len(numbers), seed)
    found = {
        "name": experiment.name,
        "hypothesis": experiment.hypothesis,
        **verdicts(claims),
        "test": f"paired sign-flip permutation test by prompt against {BOUND} SD(Δr), Holm over {len(claims)} claims",
        "prompts": len(numbers),
        "chosen_on": len(bases) - len(numbers),
        "sd": sd,
        "bound": BOUND * sd,
        "conditions": [_condition(experiment, arms, name, sd) for name in experiment.conditions],
        "claims": claims,
        "ablated": _ablated_rows(experiment, ablated, reported or {}) if ablated else None,
        "example": bases[numbers[0]].prompt[-1]["content"],
    }
    return found, as_table(experiment, bases, arms)


def choose(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    fitting: Sequence[int],
    saes: Mapping[str, Sae],
    reported: Mapping[str, pl.DataFrame],
    seed: int,
    progress: Progress = silent,
) -> Ablated:
    """The features to ablate and their controls.

    By rule: at each site the reported features whose ablation has the sign of the condition's effect, that fire more there
    than on its baseline, and whose exact ablation alone takes back a share of it, the largest first; then the site where
    they take back most together. All on the fitting prompts.
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
    found: list[tuple[float, Ablated]] = []
    for site in sites:
        sae = saes[site]
        fires, mass = _profile(sae, site, runs)
        features = rule.features
        if rule.carrying:
            more = mass[:, 0] - mass[:, 1]
            named = [int(r["feature"]) for r in reported[site].iter_rows(named=True) if r["mean_effect"] * effect > 0]
            able = [j for j in named if more[j] > 0]
            alone = dict(zip(able, _shares(rm, sae, site, runs, [[j] for j in able], effect), strict=True))
            features = sorted((j for j in able if alone[j] >= LEAST), key=lambda j: -alone[j])[: rule.count]
        traits = np.concatenate([fires + 1.0, mass.sum(1, keepdims=True) + 1e-9], 1)
        free = mass.sum(1) > 0
        controls = [alike(traits, free, features, features, seed + i).tolist() for i in range(CONTROLS if features else 0)]
        (share,) = _shares(rm, sae, site, runs, [features], effect)
        found.append((share, Ablated(site, features, controls)))
    return max(found, key=lambda item: item[0])[1]


def _shares(
    rm: RewardModel, sae: Sae, site: str, runs: Sequence[Sequence[Completion]], groups: Sequence[list[int]], effect: float
) -> list[float]:
    """What each group's ablation takes back of an effect, which is summed over runs of (condition, baseline)."""
    taken = np.zeros(len(groups))
    for condition, baseline in runs:
        both = (ablation_effects(rm, sae, site, text, groups).double().numpy() for text in (condition, baseline))
        taken += next(both) - next(both)
    return (taken / effect).tolist() if effect else [0.0] * len(groups)


def _profile(sae: Sae, site: str, runs: Sequence[Sequence[Completion]]) -> tuple[Array, Array]:
    """In how many texts of either condition a feature fires [m, 2], and its mean Σ_t f_tj |d_j| there [m, 2]."""
    fires, mass = np.zeros((sae.m, 2)), np.zeros((sae.m, 2))
    norms = sae.W_dec.norm(dim=1)
    for run in runs:
        for column, text in enumerate(run):
            active = active_on(sae, site, text)
            fires[active.feature.unique().numpy(), column] += 1
            np.add.at(mass[:, column], active.feature.numpy(), (active.value * norms[active.feature]).numpy())
    return fires, mass / max(1, len(runs))


def measure(
    rm: RewardModel,
    experiment: Experiment,
    bases: Sequence[Base],
    numbers: Sequence[int],
    ablated: Ablated | None,
    sae: Sae | None,
    progress: Progress = silent,
) -> Measurements:
    """All conditions on the prompts ``numbers``, as they are and with the features ablated; the controls are ablated where
    something is said of what ablation takes back (nan elsewhere)."""
    names, groups = list(experiment.conditions), ablated.groups if ablated else []
    full = {n for name in experiment.expects.taken_back for n in (name, experiment.against(name))}
    rewards, tokens = np.zeros((len(numbers), len(names))), np.zeros((len(numbers), len(names)), dtype=int)
    without = np.full((len(numbers), len(names), len(groups)), np.nan)
    texts: list[list[str]] = []
    for row, number in enumerate(numbers):
        texts.append([experiment.conditions[name].text(bases, number) for name in names])
        for column, text in enumerate(complete(rm, bases[number].prompt, texts[-1], [ablated.site] if ablated else [])):
            rewards[row, column] = text.reward
            tokens[row, column] = text.ids.numel() - text.start
            if ablated and sae is not None:
                asked = groups if names[column] in full else groups[:1]
                effects = ablation_effects(rm, sae, ablated.site, text, asked).numpy()
                without[row, column, : len(asked)] = text.reward - effects
        progress(row + 1, len(numbers), "prompts under all conditions")
    return Measurements(list(numbers), names, texts, rewards, tokens, without)


def _condition(experiment: Experiment, arms: Measurements, name: str, sd: float) -> dict[str, Any]:
    """A condition's figures: its effect and interval in units of reward, and the same with the features ablated."""
    against, column = experiment.against(name), arms.conditions.index(name)
    row: dict[str, Any] = {
        "name": name, "against": None if against == name else against, "text": arms.texts[0][column],
        "tokens": float(arms.tokens[:, column].mean()), "reward": float(arms.rewards[:, column].mean()),
        "effect": None, "effect_sd": None, "without": None, "taken_back": None,
    }  # fmt: skip
    if against == name:
        return row
    whole = arms.effect(experiment, name)
    row["effect"] = with_interval(whole)
    row["effect_sd"] = float(whole.mean()) / sd
    if arms.without.shape[2]:
        left = arms.effect(experiment, name, 0)
        row |= {"without": with_interval(left), "taken_back": taken_back(whole, left)}
    return row


def _ablated_rows(experiment: Experiment, ablated: Ablated, reported: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    table = reported.get(ablated.site)
    known = {int(r["feature"]): r for r in table.iter_rows(named=True)} if table is not None else {}
    features = [{"feature": j, "mean_effect": known.get(j, {}).get("mean_effect")} for j in ablated.features]
    rule = experiment.ablate.carrying if experiment.ablate else None
    return {"site": ablated.site, "carrying": rule, "features": features, "controls": len(ablated.controls)}


def as_table(experiment: Experiment, bases: Sequence[Base], arms: Measurements) -> pl.DataFrame:
    """A row a prompt and condition: prompt, condition, against, text, tokens, reward, without (null: nothing ablated)."""
    rows = [
        {
            "prompt": bases[number].prompt[-1]["content"],
            "condition": name,
            "against": experiment.against(name),
            "text": arms.texts[i][j],
            "tokens": int(arms.tokens[i, j]),
            "reward": float(arms.rewards[i, j]),
            "without": float(arms.without[i, j, 0]) if arms.without.shape[2] else None,
        }
        for i, number in enumerate(arms.numbers)
        for j, name in enumerate(arms.conditions)
    ]
    schema = {
        "prompt": pl.String, "condition": pl.String, "against": pl.String, "text": pl.String, "tokens": pl.Int32,
        "reward": pl.Float64, "without": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)
