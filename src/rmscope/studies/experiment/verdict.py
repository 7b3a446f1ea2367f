"""What an experiment expects, tested: paired sign-flip permutation tests by prompt against a bound, Holm over all claims.

A claim is *supported* where Holm's p is below :data:`ALPHA` in its own direction, *contradicted* where it is in the other,
*undecided* else. Tests run both ways, so p is twice the smaller one. Intervals are 95 %, bootstrap by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmscope.statistics import Array, flip_matrix, holm, mean_interval, ratio_interval, sign_flip_p
from rmscope.studies.experiment.conditions import Experiment

BOUND = 0.1
"""An effect counts from so many SD(Δr) on: METHOD's bound of a clean null."""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was measured: texts, rewards and tokens [prompts, conditions]; rewards without each group [.., .., groups]."""

    numbers: list[int]
    conditions: list[str]
    texts: list[list[str]]
    rewards: Array
    tokens: Array
    without: Array

    def effect(self, experiment: Experiment, condition: str, group: int | None = None) -> Array:
        """A condition's paired effects [prompts]; with ``group``, where this group is ablated from both arms."""
        rewards = self.rewards if group is None else self.without[:, :, group]
        at = [self.conditions.index(name) for name in (condition, experiment.against(condition))]
        return rewards[:, at[0]] - rewards[:, at[1]]


def claims_of(experiment: Experiment, arms: Measurements, sd: float, ablation: bool) -> list[dict[str, Any]]:
    """What the experiment expects, each as values [prompts] that exceed ``bound`` on average where it holds."""
    expects, claims = experiment.expects, list[dict[str, Any]]()
    for says, sign, names in (("up", 1, expects.up), ("down", -1, expects.down)):
        for name in names:
            effect = arms.effect(experiment, name)
            told = f"{name} {'raises' if sign > 0 else 'lowers'} the reward against {experiment.against(name)}"
            claim = {"says": says, "claim": told, "conditions": [name], "sign": sign}
            claims.append({**claim, "values": sign * effect, "bound": BOUND * sd})
    for says, sign, orders in (("rising", 1, expects.rising), ("falling", -1, expects.falling)):
        for order in orders:
            effects = np.stack([arms.effect(experiment, name) for name in order], 1)
            told = f"the effect {'rises' if sign > 0 else 'falls'} from {order[0]} to {order[-1]}"
            claim = {"says": says, "claim": told, "conditions": order, "order": order, "sign": sign}
            claim |= {"values": sign * line_rise(effects), "bound": BOUND * sd}
            claims.append(claim | {"but": _step_against(sign * effects, order)})
    for name in expects.taken_back if ablation else []:
        whole, left = arms.effect(experiment, name), arms.effect(experiment, name, 0)
        share = taken_back(whole, left)
        sign = 1 if name in expects.up or (name not in expects.down and whole.mean() >= 0) else -1
        rivals = [taken_back(whole, arms.effect(experiment, name, g))["value"] for g in range(1, arms.without.shape[2])]
        rival = max((r for r in rivals if r is not None), default=None)
        but = rival is not None and share["value"] is not None and rival >= share["value"]
        claims.append({
            "says": "taken_back", "claim": f"ablation takes back at least half of {name}", "conditions": [name],
            "sign": sign,
            "values": sign * (0.5 * whole - left), "bound": 0.0, "share": share, "alike": rival,
            "but": "sets of features alike them take back as much" if but else "",
        })  # fmt: skip
    return claims


def line_rise(effects: Array) -> Array:
    """What the straight line through each row of effects [prompts, order] rises from first to last."""
    place = np.arange(effects.shape[1]) - (effects.shape[1] - 1) / 2
    return np.asarray(effects @ place / (place @ place) * (effects.shape[1] - 1))


def _step_against(effects: Array, order: Sequence[str]) -> str:
    """Names the first step of an order whose interval lies wholly on the other side; empty where there is none."""
    for before, after, step in zip(order, order[1:], np.diff(effects, axis=1).T, strict=False):
        if mean_interval(step)[1] < 0:
            return f"the step from {before} to {after} goes the other way"
    return ""


def taken_back(whole: Array, left: Array) -> dict[str, float | None]:
    """1 - effect without the features / effect, a ratio of means; undefined where the effect's interval holds 0."""
    low, high = mean_interval(whole)
    if low <= 0 <= high:
        return {"value": None, "low": None, "high": None}
    low, high = ratio_interval(whole - left, whole, np.arange(whole.size))
    return {"value": float(1 - left.mean() / whole.mean()), "low": low, "high": high}


def judged(claims: Sequence[dict[str, Any]], prompts: int, seed: int) -> list[dict[str, Any]]:
    """Each claim with its mean and interval (in the expected direction), p, Holm's p over all of them, and its verdict."""
    signs = flip_matrix(prompts, seed)
    both = [[sign_flip_p(s * c["values"] - c["bound"], signs) for s in (1, -1)] for c in claims]
    adjusted = holm(np.array([min(1.0, 2 * min(p)) for p in both]))
    rows = []
    for claim, (for_it, against_it), p in zip(claims, both, adjusted, strict=True):
        verdict = "undecided"
        if p < ALPHA:
            verdict = "supported" if for_it < against_it else "contradicted"
        why = claim.get("but", "") if verdict == "supported" else ""
        verdict = "undecided" if why else verdict
        values, kept = claim["values"], {k: v for k, v in claim.items() if k not in ("values", "but")}
        rows.append({**kept, "effect": with_interval(values), "p": float(p), "verdict": verdict, "why": why})
    return rows


def verdicts(claims: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    """``verdict``: of what the PM does (up, down, orders); ``by_features``: of what ablation takes back, None where nothing
    is said of it. The PM may do what was supposed and the ablated features carry little of it."""
    does = [c["verdict"] for c in claims if c["says"] != "taken_back"]
    carried = [c["verdict"] for c in claims if c["says"] == "taken_back"]
    return {"verdict": overall(does or carried), "by_features": overall(carried) if carried else None}


def overall(verdicts: Sequence[str]) -> str:
    """Supported where all claims are, contradicted where one is, undecided else."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"


def with_interval(values: Array) -> dict[str, float]:
    """The mean of one value a prompt, with its interval."""
    low, high = mean_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}
