"""The result of an experiment: verdicts, claims, every condition's effect, and the ablated features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from pydantic import Field

from rmscope.report import formatting
from rmscope.report.page import Page
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure
from rmscope.studies.experiment.page import render_experiment
from rmscope.studies.experiment.verdict import JudgedClaim, Verdict


@dataclass(frozen=True, slots=True)
class ConditionFigures:
    """A condition: mean tokens and reward, and its effect against another condition, in units of reward."""

    name: str
    against: str | None
    """None for a baseline, which has no effect."""
    text: str
    """The text of the first measured prompt."""
    tokens: float
    reward: float
    effect: Figure | None = None
    effect_sd: float | None = None
    """The effect in units of SD(Δr)."""
    without: Figure | None = None
    """The effect with the features ablated from both texts."""
    taken_back: Figure | None = None
    """The share of the effect that is then gone."""


@dataclass(frozen=True, slots=True)
class AblatedFeature:
    """A feature, its mean effect in the run, and the tokens it is most active on with their share of its activation."""

    feature: int
    mean_effect: float | None
    tokens: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AblatedFeatures:
    """The ablated features of a site, and the number of matched controls."""

    site: str
    carrying: str | None
    """The condition for which they were chosen; None where the file names them."""
    features: list[AblatedFeature]
    controls: int


class ExperimentResult(Result):
    """What an experiment found. Effects are in units of reward."""

    name: str
    hypothesis: str
    verdict: Verdict
    by_features: Verdict | None
    """Whether the ablated features carry at least half of the effect; None where nothing is expected of them."""
    test: str
    prompts: int
    """Measured prompts."""
    chosen_on: int
    """Other prompts, on which the features were chosen."""
    sd: float
    """SD(Δr)."""
    bound: float
    """Effects from here on count."""
    conditions: list[ConditionFigures]
    claims: list[JudgedClaim]
    ablated: AblatedFeatures | None
    example: str
    """The first measured prompt."""
    model: str = ""
    data: str = ""
    seconds: float = 0.0
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per prompt and condition: prompt, condition, against, text, tokens, reward, without (null: not ablated)."""
    folder: Path = Field(Path("experiments"), exclude=True, repr=False)
    """Where the result is written."""

    def summary(self) -> str:
        carried = f"; that the ablated features carry it: {self.by_features}" if self.by_features else ""
        return f"{self.verdict}{carried} ({self.test}; {self.prompts} prompts, {self.seconds} s)"

    def tables(self) -> dict[str, Rows]:
        """One row per claim."""
        rows = [
            {
                "claim": c.claim,
                "effect in SD(Δr), or share taken back": " ".join(self._shown(c)),
                "p (Holm)": formatting.q_value(c.p),
                "verdict": f"{c.verdict} {c.why}".strip(),
            }
            for c in self.claims
        ]
        return {self.hypothesis: rows}

    def _shown(self, claim: JudgedClaim) -> tuple[str, str]:
        if claim.share is not None:
            return formatting.share(claim.share.value, claim.share.low, claim.share.high)
        effect = claim.effect.scaled(claim.sign / self.sd)
        return formatting.effect(effect.value, effect.low, effect.high)

    def page(self) -> Page:
        return Page(render_experiment(self.model_dump(mode="json")), self.folder / f"{self.name}.html")
