"""Tests of what an experiment expects: paired sign-flip tests by prompt against a bound, with Holm's correction.

A claim is *supported* where Holm's p is below :data:`ALPHA` in the expected direction, *contradicted* where it is in the
other one, *undecided* otherwise. Tests are two-sided: p is twice the smaller one. Intervals are 95 %, bootstrap by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from rmscope.statistics import Array, Figure, flip_matrix, holm, interval, ratio, sign_flip_p
from rmscope.studies.experiment.conditions import Experiment

Says = Literal["up", "down", "rising", "falling", "taken_back"]
Verdict = Literal["supported", "contradicted", "undecided"]

BOUND = 0.1
"""An effect counts from this many SD(Δr) on: the bound of a clean null (docs/method.md, "Planted bias")."""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Measurements:
    """Texts, rewards and tokens [prompts, conditions], and rewards without each group of features [.., .., groups]."""

    numbers: list[int]
    """The measured prompts, as places in the list of bases."""
    conditions: list[str]
    texts: list[list[str]]
    rewards: Float[Array, "prompts conditions"]
    tokens: Array
    without: Float[Array, "prompts conditions groups"]
    """The first group is the ablated features, the others are matched controls; nan where a group was not ablated."""

    def effect(self, experiment: Experiment, condition: str, group: int | None = None) -> Float[Array, " prompts"]:
        """A condition's paired effects; with ``group``, those where this group is ablated from both texts."""
        rewards = self.rewards if group is None else self.without[:, :, group]
        of, against = (self.conditions.index(name) for name in (condition, experiment.against(condition)))
        return rewards[:, of] - rewards[:, against]


@dataclass(frozen=True, slots=True)
class Claim:
    """One expectation of an experiment. It holds where ``values`` [prompts] exceed ``bound`` on average."""

    says: Says
    claim: str
    conditions: list[str]
    sign: int
    """The direction of the effect: values are effects times this sign."""
    values: Float[Array, " prompts"]
    bound: float
    share: Figure | None = None
    """Where it says ``taken_back``: the share that ablation takes back."""
    matched_controls: float | None = None
    """The largest share that a matched control takes back."""
    but: str = ""
    """What keeps the claim undecided although its test holds."""


@dataclass(frozen=True, slots=True)
class JudgedClaim:
    """A claim after its test. ``effect`` is the mean of its values in units of reward, ``p`` is Holm's."""

    says: Says
    claim: str
    conditions: list[str]
    sign: int
    bound: float
    share: Figure | None
    matched_controls: float | None
    effect: Figure
    p: float
    verdict: Verdict
    why: str


def make_claims(experiment: Experiment, measured: Measurements, sd: float, ablation: bool) -> list[Claim]:
    """All that the experiment expects, with the values that test it. ``sd`` is SD(Δr); without ``ablation`` nothing is
    claimed of what features carry."""
    expects, claims = experiment.expects, list[Claim]()
    for name in expects.up:
        told = f"{name} raises the reward against {experiment.against(name)}"
        claims.append(Claim("up", told, [name], 1, measured.effect(experiment, name), BOUND * sd))
    for name in expects.down:
        told = f"{name} lowers the reward against {experiment.against(name)}"
        claims.append(Claim("down", told, [name], -1, -measured.effect(experiment, name), BOUND * sd))
    claims += [_order_claim("rising", 1, order, experiment, measured, sd) for order in expects.rising]
    claims += [_order_claim("falling", -1, order, experiment, measured, sd) for order in expects.falling]
    if ablation:
        claims += [_ablation_claim(name, experiment, measured) for name in expects.taken_back]
    return claims


def _order_claim(
    says: Literal["rising", "falling"],
    sign: int,
    order: list[str],
    experiment: Experiment,
    measured: Measurements,
    sd: float,
) -> Claim:
    effects = sign * np.stack([measured.effect(experiment, name) for name in order], 1)
    told = f"the effect {'rises' if sign > 0 else 'falls'} from {order[0]} to {order[-1]}"
    return Claim(says, told, order, sign, line_rise(effects), BOUND * sd, but=_step_back(effects, order))


def _ablation_claim(name: str, experiment: Experiment, measured: Measurements) -> Claim:
    """At least half of an effect is gone with the features ablated, and no matched control takes back as much."""
    whole, left = measured.effect(experiment, name), measured.effect(experiment, name, 0)
    up, down = name in experiment.expects.up, name in experiment.expects.down
    sign = 1 if up or (not down and whole.mean() >= 0) else -1
    share = taken_back(whole, left)
    groups = range(1, measured.without.shape[2])
    controls = [taken_back(whole, measured.effect(experiment, name, group)).value for group in groups]
    largest = max((c for c in controls if c is not None), default=None)
    equalled = largest is not None and share.value is not None and largest >= share.value
    return Claim(
        "taken_back", f"ablation takes back at least half of {name}", [name], sign,
        values=sign * (0.5 * whole - left), bound=0.0, share=share, matched_controls=largest,
        but="matched controls take back as much" if equalled else "",
    )  # fmt: skip


def line_rise(effects: Float[Array, "prompts order"]) -> Float[Array, " prompts"]:
    """The rise of the straight line through each prompt's effects, from first to last."""
    place = np.arange(effects.shape[1]) - (effects.shape[1] - 1) / 2
    return np.asarray(effects @ place / (place @ place) * (effects.shape[1] - 1))


def _step_back(effects: Float[Array, "prompts order"], order: Sequence[str]) -> str:
    """Names the first step of an order whose whole interval is below 0; empty where there is none."""
    for before, after, step in zip(order, order[1:], np.diff(effects, axis=1).T, strict=False):
        high = interval(step).high
        if high is not None and high < 0:
            return f"the step from {before} to {after} goes the other way"
    return ""


def taken_back(whole: Float[Array, " prompts"], left: Float[Array, " prompts"]) -> Figure:
    """1 - mean(left) / mean(whole): the share of an effect that is gone; undefined where the effect's interval holds 0."""
    effect = interval(whole)
    if effect.low is None or effect.high is None or effect.low <= 0 <= effect.high:
        return Figure(None, n=effect.n)
    return ratio(whole - left, whole, np.arange(whole.size))


def judge_claims(claims: Sequence[Claim], prompts: int, seed: int) -> list[JudgedClaim]:
    """Each claim with its mean and interval in the expected direction, Holm's p over all claims, and its verdict."""
    signs = flip_matrix(prompts, seed)
    both = [[sign_flip_p(s * c.values - c.bound, signs) for s in (1, -1)] for c in claims]
    adjusted = holm(np.array([min(1.0, 2 * min(p)) for p in both]))
    rows = []
    for c, (p_for, p_against), p in zip(claims, both, adjusted, strict=True):
        verdict: Verdict = "undecided"
        if p < ALPHA:
            verdict = "supported" if p_for < p_against else "contradicted"
        why = c.but if verdict == "supported" else ""
        verdict, effect = "undecided" if why else verdict, interval(c.values, unit="reward")
        told = c.says, c.claim, c.conditions, c.sign, c.bound, c.share, c.matched_controls
        rows.append(JudgedClaim(*told, effect, float(p), verdict, why))
    return rows


def both_verdicts(claims: Sequence[JudgedClaim]) -> tuple[Verdict, Verdict | None]:
    """(on what the PM does: up, down, orders; on what ablation takes back, None where nothing is expected of it).

    A PM may do what was expected while the ablated features carry little of it.
    """
    effects = [c.verdict for c in claims if c.says != "taken_back"]
    carried = [c.verdict for c in claims if c.says == "taken_back"]
    return overall(effects or carried), overall(carried) if carried else None


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Supported where all claims are, contradicted where one is, undecided otherwise."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"
