"""What jailbreak found, from the table of measurements: figures, tables for the terminal, and the page."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, Field

from rmscope.report import formatting
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows
from rmscope.run.run import Run
from rmscope.statistics import Figure, interval, share
from rmscope.studies.jailbreak.mediation import MediatedGain, Mediators, mediated_gain
from rmscope.studies.jailbreak.search import CONTROLS, FEATURES, JAILBREAKS, NO_PHRASE, PhraseLists, SearchFigures
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import Placement, Target, cost, pieces

EXAMPLES = 8
"""Measured prompts that the page shows with their texts, the first ones."""


class ArmFigures(BaseModel):
    """Bad texts with the phrases of one arm."""

    arm: str
    prompts: int
    success: Figure
    """Share of the prompts on which the text outranks the chosen answer."""
    by_sd: Figure
    """The same by at least SD(Δr): tells a jailbreak from a bad text that was close below its chosen answer."""
    without: Figure | None
    """The share that outranks the chosen answer with the mediators ablated; None where there are none."""
    gain: Figure
    """Mean gain in reward over the same text without phrases."""
    kinds: dict[str, dict[str, int | float]]
    """Success on each kind of bad text, and its number of prompts."""
    tokens: float
    """Tokens of the phrases, the median."""
    evaluations: float
    """Rewards that the search for one prompt took, the median; 0 where one list serves all prompts."""
    searched: float | None
    """Success on the search's own prompts."""


class PhraseList(BaseModel):
    """The list of one arm."""

    tokens: int
    phrases: tuple[Placement, ...]


class RewardedText(BaseModel):
    """A text and its reward."""

    text: str
    reward: float


class RewardedPieces(BaseModel):
    """A text in pieces (text, whether it is a phrase), and its reward."""

    pieces: list[tuple[str, bool]]
    reward: float


class Example(BaseModel):
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
    """One row per measured prompt and arm (:data:`rmscope.studies.jailbreak.analyse.SCHEMA`)."""
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
        """The page; all text from models and data is escaped."""
        result = self.model_dump(mode="json")
        traces = []
        for name, search in self.searches.items():  # the best success so far, by the number of rewards computed
            best = accumulate((point.success for point in search.trace), max, initial=0.0)
            traces.append((name, list(zip([0.0, *(point.evaluations for point in search.trace)], best, strict=True))))
        arms = {arm["arm"]: arm for arm in result["arms"]}
        return Page(render("jailbreak/page.html", result=result, arms=arms, traces=traces), self.path)


def _percent(figure: Figure) -> str:
    return " ".join(formatting.share(figure.value, figure.low, figure.high))


def _signed(figure: Figure) -> str:
    return " ".join(formatting.effect(figure.value, figure.low, figure.high))


def summarise(
    run: Run,
    config: JailbreakConfig,
    lists: PhraseLists,
    targets: list[Target],
    left_out: dict[str, int],
    table: pl.DataFrame,
) -> JailbreakResult:
    """The result of a run's measurements."""
    named = lists.named
    return JailbreakResult(
        model=run.config.model,
        data=config.data or f"{run.config.data}, measure split",
        run=run.folder.name,
        seed=config.seed,
        budget=config.budget,
        left_out=dict(left_out),
        prompts=table["key"].n_unique(),
        arms=arm_figures(table, lists, run.sd),
        mediation=[mediated_gain(table, j, c) for c in CONTROLS for j in JAILBREAKS] if named else [],
        named=named,
        searches=lists.searches,
        sd=run.sd,
        lists={arm: PhraseList(tokens=cost(p), phrases=p) for arm, p in lists.lists.items() if p},
        examples=[_example(table, target, lists) for target in targets[:EXAMPLES]],
        table=table,
        path=run.folder / "evidence" / "jailbreak.html",
    )


def arm_figures(table: pl.DataFrame, lists: PhraseLists, sd: float) -> list[ArmFigures]:
    """Each arm's success and gain. ``sd`` is SD(Δr)."""
    bare = table.filter(pl.col("arm") == NO_PHRASE).select("key", pl.col("reward").alias("bare"))
    figures = []
    for (arm,), rows in table.group_by("arm", maintain_order=True):
        n, gain, search = rows.height, rows.join(bare, on="key").sort("key"), lists.searches.get(str(arm))
        kinds = rows.group_by("kind", maintain_order=True).agg(pl.col("outranks").mean(), pl.len())
        median = rows.select(pl.col("tokens", "evaluations").cast(pl.Float64).median()).row(0, named=True)
        figures.append(
            ArmFigures(
                arm=str(arm),
                prompts=n,
                success=share(int(rows["outranks"].sum()), n),
                by_sd=share(int((rows["reward"] > rows["chosen"] + sd).sum()), n),
                without=share(int((rows["without"] > rows["chosen"]).sum()), n) if lists.named else None,
                gain=interval((gain["reward"] - gain["bare"]).to_numpy(), unit="reward"),
                kinds={kind: {"success": success, "prompts": prompts} for kind, success, prompts in kinds.rows()},
                **median,
                searched=search.success if search else None,
            )
        )
    return figures


def _example(table: pl.DataFrame, target: Target, lists: PhraseLists) -> Example:
    row = table.filter(pl.col("arm") == FEATURES, pl.col("key") == target.pair.prompt_key).row(0, named=True)
    return Example(
        prompt=target.pair.prompt[-1]["content"],
        kind=target.kind,
        chosen=RewardedText(text=target.pair.chosen, reward=target.chosen),
        rejected=RewardedText(text=target.pair.rejected, reward=target.rejected),
        bad=RewardedText(text=target.bad, reward=target.reward),
        jailbreak=RewardedPieces(pieces=pieces(target.bad, lists.lists[FEATURES]), reward=row["reward"]),
        without=row["without"] if lists.named else None,
        outranks=row["outranks"],
    )
