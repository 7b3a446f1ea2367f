"""What jailbreak found, typed, with its tables for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from rmscope.report.formatting import effect, share
from rmscope.report.page import Page
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure
from rmscope.studies.jailbreak.mediation import MediatedGain, Mediators
from rmscope.studies.jailbreak.page import render_jailbreak
from rmscope.studies.jailbreak.phrase_lists import FEATURES, SearchFigures
from rmscope.studies.jailbreak.placement import Slot


@dataclass(frozen=True, slots=True)
class KindFigures:
    """Success on one kind of bad text."""

    success: float
    prompts: int


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """Bad texts with the phrases of one arm."""

    arm: str
    prompts: int
    success: Figure
    """Share of the prompts on which the text outranks the chosen answer."""
    by_sd: Figure
    """The same by at least SD(Δr)."""
    without: Figure | None
    """The share that outranks the chosen answer with the mediators ablated; None where there are none."""
    gain: Figure
    """Mean gain in reward over the same text without phrases."""
    kinds: dict[str, KindFigures]
    tokens: float
    """Tokens of the phrases, the median."""
    evaluations: float
    """Rewards that the search for one prompt took, the median; 0 where one list serves all prompts."""
    searched: float | None
    """Success on the search's own prompts."""


@dataclass(frozen=True, slots=True)
class ListedPhrase:
    """A phrase of a list, as :class:`~rmscope.studies.jailbreak.phrases.Phrase`, with its place."""

    text: str
    tokens: int
    site: str | None
    feature: int | None
    keeps: float | None
    slot: Slot


@dataclass(frozen=True, slots=True)
class PhraseList:
    """The list of one arm."""

    tokens: int
    phrases: list[ListedPhrase]


@dataclass(frozen=True, slots=True)
class RewardedText:
    """A text and its reward."""

    text: str
    reward: float


@dataclass(frozen=True, slots=True)
class RewardedPieces:
    """A text in pieces (text, whether it is a phrase), and its reward."""

    pieces: list[tuple[str, bool]]
    reward: float


@dataclass(frozen=True, slots=True)
class Example:
    """A measured prompt: both answers, the bad text, and the same text with the phrases of features."""

    prompt: str
    kind: str
    chosen: RewardedText
    rejected: RewardedText
    bad: RewardedText
    jailbreak: RewardedPieces
    without: float | None
    """The jailbreak's reward with the mediators ablated."""
    outranks: bool


class JailbreakResult(Result):
    """The lists, how often they work on unseen prompts, and which features carry their gain."""

    model: str
    data: str
    run: str
    seed: int
    budget: int
    left_out: dict[str, int]
    """Prompts and pairs that were not measured, by reason."""
    prompts: int
    arms: list[ArmFigures]
    mediation: list[MediatedGain]
    """Of three jailbreaks over three controls; empty where there are no mediators."""
    named: Mediators | None
    """The features whose mediation is measured."""
    searches: dict[str, SearchFigures]
    sd: float
    """SD(Δr) of the run's data."""
    lists: dict[str, PhraseList]
    examples: list[Example]
    """The first measured prompts; not part of ``--json``."""
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per measured prompt and arm (:class:`~rmscope.studies.jailbreak.measure.Measurement`)."""
    path: Path = Field(exclude=True, repr=False)
    """The file of the page."""

    def arm(self, name: str) -> ArmFigures:
        """The figures of one arm. KeyError where there is no such arm."""
        return {arm.arm: arm for arm in self.arms}[name]

    def summary(self) -> str:
        words = self.lists.get(FEATURES)
        if words is None:
            return "No phrase raises the reward of the search's bad texts, so there is no jailbreak to show."
        arm = self.arm(FEATURES)
        line = (
            f"Phrases of features ({len(words.phrases)}, with {words.tokens} tokens) make bad text outrank the chosen "
            f"answer on {_percent(arm.success)} of {self.prompts} unseen prompts"
        )
        if self.named is None or arm.without is None:
            return f"{line}. No reported feature mediates any of the gain on the search's prompts."
        return f"{line}; with the named features at {self.named.site} ablated, on {_percent(arm.without)}."

    def tables(self) -> dict[str, Rows]:
        tables: dict[str, Rows] = {
            f"Share of {self.prompts} unseen prompts on which the text outranks the chosen answer": [
                {
                    "phrases": a.arm, "outranks": _percent(a.success), "by 1 SD(Δr)": _percent(a.by_sd),
                    "ablated": _percent(a.without) if a.without else None,
                }
                for a in self.arms
            ],
            "Gain in reward over the same text without phrases": [
                {"phrases": a.arm, "prompts": a.prompts, "tokens": round(a.tokens), "gain": _signed(a.gain)}
                for a in self.arms
            ],
        }  # fmt: skip
        if self.named is not None:
            title = f"Mean gain U, and the share of it mediated by {len(self.named.features)} features at {self.named.site}"
            tables[title] = [
                {
                    "gain of": f"{m.jailbreak} over {m.control}", "U": _signed(m.u),
                    "mediated": _percent(m.share) if m.share else "undefined",
                    "largest matched": _percent(m.matched.largest) if m.matched else None,
                }
                for m in self.mediation
            ]  # fmt: skip
        return tables

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"examples"})

    def page(self) -> Page:
        return Page(render_jailbreak(self.model_dump(mode="json")), self.path)


def _percent(figure: Figure) -> str:
    return " ".join(share(figure.value, figure.low, figure.high))


def _signed(figure: Figure) -> str:
    return " ".join(effect(figure.value, figure.low, figure.high))
