"""What an experiment finds: claims and their tests, every condition's effect, the ablated features; tables and page.

The tests are paired sign-flip tests by prompt against a bound, with Holm's correction. A claim is *supported* where Holm's p
is below :data:`ALPHA` in the expected direction, *contradicted* where it is in the other one, *undecided* otherwise. Tests
are two-sided: p is twice the smaller one. Intervals are 95 %, bootstrap by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float
from markupsafe import Markup
from pydantic import Field

from rmscope.planted.matching import TIE
from rmscope.report import figures, formatting
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows
from rmscope.statistics import NOTHING, Array, Figure, flip_matrix, holm, interval, ratio, sign_flip_p
from rmscope.studies.experiment.conditions import Experiment

Says = Literal["up", "down", "rising", "falling", "taken_back"]
Verdict = Literal["supported", "contradicted", "undecided"]

BOUND = 0.1
"""An effect counts from this many SD(Δr) on: the bound of a clean null (docs/method.md, "Planted bias")."""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Measurements:
    """The table of the result, and the rewards without each group of features: first the ablated features, then matched
    controls; nan where a group was not ablated."""

    experiment: Experiment
    table: pl.DataFrame
    without: Float[Array, "prompts conditions groups"]

    def effect(self, condition: str, group: int | None = None) -> Float[Array, " prompts"]:
        """A condition's paired effects; with ``group``, those where this group is ablated from both texts."""
        order = list(self.experiment.conditions)
        rewards = self.table["reward"].to_numpy().reshape(-1, len(order)) if group is None else self.without[..., group]
        return rewards[:, order.index(condition)] - rewards[:, order.index(self.experiment.against(condition))]


@dataclass(frozen=True, slots=True)
class Claim:
    """An expectation: effects times ``sign`` exceed ``bound`` on average, in units of reward. ``share`` is what ablation
    takes back, ``p`` is Holm's, ``why`` is what keeps a claim undecided although its test holds."""

    says: Says
    claim: str
    conditions: list[str]
    sign: int
    bound: float
    share: Figure | None = None
    matched_controls: float | None = None
    """The largest share that a matched control takes back."""
    effect: Figure = NOTHING
    p: float = 1.0
    verdict: Verdict = "undecided"
    why: str = ""


Tested = tuple[Claim, Float[Array, " prompts"]]
"""A claim before its test, and its values."""


def make_claims(measured: Measurements, sd: float) -> list[Tested]:
    """All that the experiment expects. ``sd`` is SD(Δr); without an ablation nothing is claimed of what features carry."""
    experiment, claims = measured.experiment, list[Tested]()
    expects, directions = experiment.expects, (1, -1)
    for sign, names in zip(directions, (expects.up, expects.down), strict=True):
        for name in names:
            sentence = f"{name} {'raises' if sign > 0 else 'lowers'} the reward against {experiment.against(name)}"
            claim = Claim("up" if sign > 0 else "down", sentence, [name], sign, BOUND * sd)
            claims.append((claim, sign * measured.effect(name)))
    for sign, orders in zip(directions, (expects.rising, expects.falling), strict=True):
        for order in orders:
            effects = sign * np.stack([measured.effect(name) for name in order], 1)
            sentence = f"the effect {'rises' if sign > 0 else 'falls'} from {order[0]} to {order[-1]}"
            says: Says = "rising" if sign > 0 else "falling"
            claim = Claim(says, sentence, order, sign, BOUND * sd, why=_step_back(effects, order))
            claims.append((claim, line_rise(effects)))
    return claims + [_ablation_claim(measured, name) for name in expects.taken_back if measured.without.shape[2]]


def _ablation_claim(measured: Measurements, name: str) -> Tested:
    """At least half of an effect is gone with the features ablated, and no matched control takes back as much."""
    expects, whole, left = measured.experiment.expects, measured.effect(name), measured.effect(name, 0)
    sign = 1 if name in expects.up or (name not in expects.down and whole.mean() >= 0) else -1
    share, groups = taken_back(whole, left), range(1, measured.without.shape[2])
    controls = [taken_back(whole, measured.effect(name, group)).value for group in groups]
    largest = max((c for c in controls if c is not None), default=None)
    equalled = largest is not None and share.value is not None and largest >= share.value - TIE
    sentence, why = f"ablation takes back at least half of {name}", "matched controls take back as much" if equalled else ""
    return Claim("taken_back", sentence, [name], sign, 0.0, share, largest, why=why), sign * (0.5 * whole - left)


def line_rise(effects: Float[Array, "prompts order"]) -> Float[Array, " prompts"]:
    """The rise of the straight line through each prompt's effects, from first to last."""
    place = np.arange(effects.shape[1]) - (effects.shape[1] - 1) / 2
    return np.asarray(effects @ place / (place @ place) * (effects.shape[1] - 1))


def _step_back(effects: Float[Array, "prompts order"], order: Sequence[str]) -> str:
    """Names the first step of an order whose whole interval is below 0; empty where there is none."""
    highs = [interval(step).high for step in np.diff(effects, axis=1).T]
    back = [i for i, high in enumerate(highs) if high is not None and high < 0]
    return f"the step from {order[back[0]]} to {order[back[0] + 1]} goes the other way" if back else ""


def taken_back(whole: Float[Array, " prompts"], left: Float[Array, " prompts"]) -> Figure:
    """1 - mean(left) / mean(whole): the share of an effect that is gone; undefined where the effect's interval holds 0."""
    effect = interval(whole)
    if effect.low is None or effect.high is None or effect.low <= 0 <= effect.high:
        return Figure(None, n=effect.n)
    return ratio(whole - left, whole, np.arange(whole.size))


def judge_claims(claims: Sequence[Tested], prompts: int, seed: int) -> list[Claim]:
    """Each claim with its mean and interval in the expected direction, Holm's p over all claims, and its verdict."""
    signs = flip_matrix(prompts, seed)
    both = [[sign_flip_p(s * values - claim.bound, signs) for s in (1, -1)] for claim, values in claims]
    adjusted = holm(np.array([min(1.0, 2 * min(p)) for p in both]))
    judged = []
    for (claim, values), (p_for, p_against), p in zip(claims, both, adjusted, strict=True):
        verdict: Verdict = "undecided"
        if p < ALPHA:
            verdict = "supported" if p_for < p_against else "contradicted"
        why, effect = claim.why if verdict == "supported" else "", interval(values, unit="reward")
        judged.append(replace(claim, effect=effect, p=float(p), verdict="undecided" if why else verdict, why=why))
    return judged


def both_verdicts(claims: Sequence[Claim]) -> tuple[Verdict, Verdict | None]:
    """(on what the PM does: up, down, orders; on what ablation takes back, None where nothing is expected of it), because a
    PM may do what was expected while the ablated features carry little of it."""
    effects = [c.verdict for c in claims if c.says != "taken_back"]
    carried = [c.verdict for c in claims if c.says == "taken_back"]
    return overall(effects or carried), overall(carried) if carried else None


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Supported where all claims are, contradicted where one is, undecided otherwise."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if set(verdicts) == {"supported"} else "undecided"


@dataclass(frozen=True, slots=True)
class ConditionFigures:
    """A condition: a text, mean tokens and reward, and its effect against another one, in units of reward and of SD(Δr).
    ``without`` is the effect with the features ablated from both texts, ``taken_back`` the share that is then gone."""

    name: str
    against: str | None
    """None for a baseline, which has no effect."""
    text: str
    tokens: float
    reward: float
    effect: Figure | None = None
    effect_sd: float | None = None
    without: Figure | None = None
    taken_back: Figure | None = None


def condition_figures(measured: Measurements, name: str, sd: float) -> ConditionFigures:
    """The figures of one condition. ``sd`` is SD(Δr)."""
    against, rows = measured.experiment.against(name), measured.table.filter(pl.col("condition") == name)
    tokens, reward = (float(rows[column].to_numpy().mean()) for column in ("tokens", "reward"))
    row = ConditionFigures(name, None, rows["text"][0], tokens, reward)
    if against == name:
        return row
    whole = measured.effect(name)
    row = replace(row, against=against, effect=interval(whole, unit="reward"), effect_sd=float(whole.mean()) / sd)
    left = measured.effect(name, 0) if measured.without.shape[2] else None
    return row if left is None else replace(row, without=interval(left, unit="reward"), taken_back=taken_back(whole, left))


@dataclass(slots=True)
class AblatedFeature:
    """A feature, its mean effect in the run, and the tokens it is most active on with their share of its activation."""

    feature: int
    mean_effect: float | None
    tokens: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AblatedFeatures:
    """The ablated features of a site, the condition for whose effect they were chosen, and how many matched controls."""

    site: str
    carrying: str | None
    features: list[AblatedFeature]
    controls: int


class ExperimentResult(Result):
    """What an experiment found on ``prompts`` prompts; its features were chosen on ``chosen_on`` others. Effects are in
    units of reward, of which ``sd`` is SD(Δr); from ``bound`` on they count. See :func:`both_verdicts`."""

    name: str
    hypothesis: str
    verdict: Verdict
    by_features: Verdict | None
    test: str
    prompts: int
    chosen_on: int
    sd: float
    bound: float
    conditions: list[ConditionFigures]
    claims: list[Claim]
    ablated: AblatedFeatures | None
    example: str
    model: str = ""
    data: str = ""
    seconds: float = 0.0
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per prompt and condition: prompt, condition, against, text, tokens, reward, without (null: not ablated)."""
    folder: Path = Field(Path("experiments"), exclude=True, repr=False)

    def summary(self) -> str:
        carried = f"; that the ablated features carry it: {self.by_features}" if self.by_features else ""
        return f"{self.verdict}{carried} ({self.test}; {self.prompts} prompts, {self.seconds} s)"

    def tables(self) -> dict[str, Rows]:
        """One row per claim."""
        rows = []
        for c in self.claims:
            shown, write = c.share or c.effect.scaled(c.sign / self.sd), formatting.share if c.share else formatting.effect
            effect = " ".join(write(shown.value, shown.low, shown.high))
            row = {"claim": c.claim, "effect in SD(Δr), or share taken back": effect, "p (Holm)": formatting.q_value(c.p)}
            rows.append(row | {"verdict": f"{c.verdict} {c.why}".strip()})
        return {self.hypothesis: rows}

    def page(self) -> Page:
        """The verdict, every condition's effect with and without ablation, the texts of one prompt."""
        effects = [effect for row in self.conditions for effect in (row.effect, row.without) if effect is not None]
        ends = [end for effect in effects for end in (effect.value, effect.low, effect.high)]
        span = figures.extent(ends, include=[0.0, self.bound, -self.bound], pad=0.04)
        trends = [(c.claim, self._trend(c)) for c in self.claims if c.says in ("rising", "falling")]
        html = render("experiment/page.html", found=self, span=span, trends=trends)
        return Page(html, self.folder / f"{self.name}.html")

    def _trend(self, claim: Claim) -> Markup:
        """An ordered list of conditions as a curve; beside it the same with the features ablated, and the baselines."""
        rows = {row.name: row for row in self.conditions}
        order = [rows[name] for name in claim.conditions]
        baselines = [rows[str(row.against)] for row in order]
        series = [("as it is", 2, _points(order, "effect")), ("features ablated", 1, _points(order, "without"))]
        if len({row.name for row in baselines}) > 1:
            series.append(("what it is held against", 4, _points(baselines, "effect")))
        marks = [(float(i), row.name.replace("_", " ")) for i, row in enumerate(order)]
        return figures.band_curves(series, "condition", "effect, reward", claim.claim, marks, self.bound)


def _points(rows: Sequence[ConditionFigures], which: Literal["effect", "without"]) -> list[tuple[float | None, ...]]:
    effects = [(i, getattr(row, which)) for i, row in enumerate(rows)]
    return [(i, effect.value, effect.low, effect.high) for i, effect in effects if effect is not None]
