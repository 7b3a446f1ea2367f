"""The result of a comparison: SAEs in both PMs, features with their class, concepts; and its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from rmscope.report import figures
from rmscope.report import formatting as fmt
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure

LISTED = 20
"""Concepts in the table for the terminal, at most."""
SD = "SD(Δr)"
"""The unit of ablation effects."""
SWAP_COUNTS = {"differ": "differ", "changed_sign": "change sign", "hold": "hold", "signs_hold": "change sign and hold"}
"""The counts of a :class:`Swap`, as tables call them."""
FeatureClass = Literal["appeared", "vanished", "changed sign", "strengthened", "weakened", "kept", "undecided", "moved"]
"""Those of :data:`~rmscope.studies.compare.classify.CLASSES`; ``moved`` is a class of concepts alone."""


@dataclass(frozen=True, slots=True)
class SaeFigures:
    """An SAE on the stream of one PM. FVU is centred per dimension at the PM's own mean; dead features never fire."""

    l0: Figure
    fvu: Figure
    dead: float


@dataclass(frozen=True, slots=True)
class SiteComparison:
    """One SAE in both PMs, over the same tokens; ``of`` is a or b: whose SAE it is."""

    of: str
    site: str
    m: int
    tokens: int
    reported: int
    a: SaeFigures
    b: SaeFigures
    rates: float | None
    """Rank correlation of the features' firing rates."""
    activation_ratio: float | None
    """Mean activation where features fire, B over A."""
    together: float | None
    """Of the firings in either PM, the share in both at the same token."""
    there: Figure
    """Share of the reported features that are there in both PMs: at least half of their firings are together."""
    found_again: Figure | None
    """Share of the reported features that the other PM's own SAE has too; None where it has none."""


@dataclass(frozen=True, slots=True)
class RewardComparison:
    """Δr of both PMs on the fresh pairs; ``controls`` are the correlations of the controls' Δr with A's."""

    sd_a: float
    sd_b: float
    correlation: float
    agreement: float
    controls: list[float]


@dataclass(frozen=True, slots=True)
class Chance:
    """Where B is of A's kind too: the share of differences that hold, and of changes of sign; each as a range, which begins
    at 0 where only its end is known."""

    holds: tuple[float, float]
    signs: tuple[float, float]

    def __str__(self) -> str:
        return f"{_range(self.holds)} of the differences ({_range(self.signs)} of changes of sign)"


def _range(shares: tuple[float, float]) -> str:
    low, high = (f"{value:.2f}".removeprefix("0") for value in shares)
    return f"{low} to {high}" if shares[0] else f"at most {high}"


@dataclass(frozen=True, slots=True)
class Swap:
    """B, or a control in B's place: of A's features, how many differ from A, change sign, hold against all other PMs, and
    change sign and hold. ``p``: by count, the share of B and the controls with at least as many; none with one control."""

    pm: str
    features: int
    differ: int
    changed_sign: int
    hold: int
    signs_hold: int
    p: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How many reported features are of a class, and its definition."""

    class_: Annotated[FeatureClass, Field(serialization_alias="class")]
    features: int
    means: str


@dataclass(frozen=True, slots=True)
class Member:
    """A feature of a concept, with its own class."""

    of: str
    feature: int
    class_: Annotated[FeatureClass | None, Field(serialization_alias="class")]


class FeatureComparison(BaseModel):
    """A reported feature of A or of B in both PMs.

    ``tokens`` are those on which it is most active. It fires on ``fire_a`` tokens in A and on ``both`` in both PMs
    (``together``: Jaccard); there Σ f is ``sum_a``, its mean ``act_a``. ``match`` is the nearest feature of the other PM's
    own SAE, found again where both cosines are at least .7. Effects are means over fresh prompts, each in SD(Δr) of its PM;
    they are None where nothing was ablated: in a base, and for a feature that fires on no fresh response.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    of: str
    site: str
    feature: int
    tokens: list[str] = []
    fire_a: int = 0
    fire_b: int = 0
    both: int = 0
    sum_a: float = 0.0
    sum_b: float = 0.0
    act_a: float | None = None
    act_b: float | None = None
    together: float | None = None
    match: int | None = None
    cosine: float | None = None
    encoder_cosine: float | None = None
    found_again: bool | None = None
    prompts: int = 0
    a: Figure | None = None
    a_q: float | None = None
    b: Figure | None = None
    b_q: float | None = None
    difference: Figure | None = None
    """B - A, paired by prompt."""
    difference_q: float | None = None
    control: Figure | None = None
    """The effect in the control; of several, in the one nearest to B."""
    control_p: float | None = None
    """The share of B and the controls whose effect differs from A's by at least as much as B's; None with one control."""
    holds: bool | None = None
    """Whether a difference holds against the controls; None where there is no control or no difference."""
    class_: FeatureClass | None = Field(None, alias="class")
    concept: int | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> FeatureComparison:
        """From a row of the result's table, in which a figure has three columns: its name, ``_low`` and ``_high``."""
        values = {name: value for name, value in row.items() if name in cls.model_fields or name == "class"}
        for name in ("a", "b", "difference", "control"):
            if row.get(name) is not None:
                values[name] = Figure(row[name], row[f"{name}_low"], row[f"{name}_high"], row["prompts"], SD)
        return cls.model_validate(values)


class Concept(FeatureComparison):
    """Features with like decoders, with the figures of the one whose effect is largest."""

    class_: FeatureClass = Field(alias="class")
    members: list[Member]
    changed: bool
    """Whether the concept differs between A and B."""


class CompareResult(Result):
    """Two PMs on the same fresh pairs. Effects are in SD(Δr) of each PM."""

    a: str
    b: str
    base: bool
    """Whether B is a base without a scalar head; then there are no effects, classes and concepts."""
    b_has_run: bool
    controls: list[str]
    chance: Chance | None
    """The chance level of what holds; None without a control."""
    swaps: list[Swap]
    """B, then each control in B's place; empty without a control."""
    pairs: int
    prompts: int
    sites: list[SiteComparison]
    """One row per SAE: A's, then B's, by depth."""
    delta: RewardComparison | None
    classes: list[ClassCount]
    concepts: list[Concept]
    """The largest effects first."""
    features: list[FeatureComparison]
    data: list[str] = []
    """The data of the runs."""
    seconds: float = 0.0
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per reported feature of A and of B."""
    path: Path = Field(Path("compare.html"), exclude=True)
    """The file of the page."""

    @property
    def changed(self) -> list[Concept]:
        """The concepts that differ."""
        return [c for c in self.concepts if c.changed]

    def as_json(self) -> Any:
        return self.model_dump(mode="json", by_alias=True)

    def summary(self) -> str:
        if self.base:
            hits = [(round((s.there.value or 0.0) * (s.there.n or 0)), s) for s in self.sites]
            there = ", ".join(f"{n} of {s.reported} at {s.site}" for n, s in hits)
            return f"Reported features of A ({self.a}) that fire in the base {self.b} where they fire in A: {there}."
        counts = ", ".join(f"{n} {name}" for name, n in Counter(c.class_ for c in self.changed).items())
        held = f" {sum(bool(c.holds) for c in self.changed)} hold against {self._controls}." if self.controls else ""
        if self.controls:
            held += f" Between PMs of one kind {self.chance} would."
        differ = f"{len(self.changed)} of {len(self.concepts)} concepts differ{f' ({counts})' if counts else ''}"
        return f"{differ} between A ({self.a}) and B ({self.b}), on {self.prompts} fresh prompts.{held}"

    def tables(self) -> dict[str, Rows]:
        tables: dict[str, Rows] = {
            f"The same SAEs in A and in B, {self.prompts} fresh prompts": [
                {
                    "SAE": f"{s.of.upper()} {s.site}",
                    "L0 A": _value(s.a.l0), "L0 B": _value(s.b.l0), "FVU A": _value(s.a.fvu), "FVU B": _value(s.b.fvu),
                    "dead A": fmt.percent(s.a.dead), "dead B": fmt.percent(s.b.dead),
                }
                for s in self.sites
            ],
            "Their features in both": [
                {
                    "SAE": f"{s.of.upper()} {s.site}", "rates": fmt.number(s.rates), "reported": s.reported,
                    "there in both": " ".join(fmt.share(s.there.value, s.there.low, s.there.high)),
                }
                for s in self.sites
            ],
        }  # fmt: skip
        if self.classes:
            tables["Reported features by class"] = [{"class": c.class_, "features": c.features} for c in self.classes]
        if self.swaps:
            title = "A's features in B, and in each control in B's place"
            tables[title] = [self._swap_row(s) for s in self.swaps]
            if (p := self.swaps[0].p) is not None:
                shown = {name: f"p {fmt.q_value(p[key])}" for key, name in SWAP_COUNTS.items()}
                tables[title] = [*tables[title], {"PM": "B beside the controls", **shown}]
        if self.changed:
            tables[f"Concepts that differ, ablation effects in {SD}"] = [self._row(c) for c in self.changed[:LISTED]]
        return tables

    @property
    def _controls(self) -> str:
        return "the control" if len(self.controls) == 1 else f"all {len(self.controls)} controls"

    @property
    def control_name(self) -> str:
        """What the figures of a control are called; of several controls those of one are shown."""
        return "control" if len(self.controls) == 1 else "control nearest to B"

    def _swap_row(self, swap: Swap) -> dict[str, str]:
        return {"PM": swap.pm, **{name: f"{getattr(swap, key)} of {swap.features}" for key, name in SWAP_COUNTS.items()}}

    def _row(self, c: Concept) -> dict[str, str]:
        """A row of several lines: one per PM, one for the difference."""
        shown = {"A": c.a, "B": c.b, "B − A": c.difference, **({self.control_name: c.control} if self.controls else {})}
        against = ["holds" if c.holds else "does not hold"] if self.controls else []
        return {
            "concept": f"{c.of.upper()} {c.feature}, {c.site}\n{' '.join(map(repr, c.tokens[:3]))}",
            "in": "\n".join(shown),
            "effect": "\n".join(" ".join(fmt.effect(f.value, f.low, f.high)) if f else fmt.MISSING for f in shown.values()),
            "class": "\n".join([c.class_, f"q {fmt.q_value(c.difference_q)}", *against]),
        }

    def page(self) -> Page:
        """The page; texts are escaped."""
        ends = [v for c in self.changed for f in (c.a, c.b) if f for v in (f.value, f.low, f.high)]
        span = figures.extent(ends, include=[0.0], pad=0.04)
        effects = [(f.a.value, f.b.value) for f in self.features if f.a and f.b]
        classes = [(c.class_, c.features) for c in self.classes]
        return Page(
            render(
                "compare/page.html",
                data=self.as_json(),
                span=span,
                effects=effects,
                classes=classes,
                counts=SWAP_COUNTS,
                of=self,
            ),
            self.path,
        )


def _value(figure: Figure) -> str:
    return fmt.estimate(figure.value, figure.low, figure.high)[0]
