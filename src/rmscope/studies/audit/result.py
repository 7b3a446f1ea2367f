"""What an audit found."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from pydantic import BaseModel, Field

from rmscope.planted.results import CueResult, RecallMetrics
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure

SHOWN = 4
"""From this many features on, a match is told by their number."""


@dataclass(frozen=True, slots=True)
class ReportedShare(Figure):
    """The share of frozen features that a run reports, how many concepts it reports, and SD(Δr) of its PM."""

    sd_delta: float = 0.0
    concepts: int = 0


@dataclass(frozen=True, slots=True)
class DecoyShare(Figure):
    """The share of decoy cues that reported features match, and their words."""

    words: tuple[str, ...] = ()


class Calibration(BaseModel):
    """What is reported on a PM of labels drawn by coin, on one of random weights, and of words that no plant uses."""

    shuffled: ReportedShare
    random: ReportedShare
    decoys: DecoyShare


class Audited(BaseModel):
    """What was audited."""

    base: str
    pm: str
    pm_identity: str
    pairs: str
    seed: int
    planted_pairs: int
    held_out_prompts: int
    sd_delta: float
    sites: list[str]


class AuditResult(Result, RecallMetrics):
    """The figures of an audit, and one row per plant."""

    stability: Figure
    """The share of reported features that SAEs of another seed have too: a feature there fires alike."""
    concept_stability: Figure
    """The same for reported concepts."""
    concepts: int = 0
    """Reported concepts."""
    calibration: Calibration | None = None
    plants: list[CueResult]
    audited: Audited
    seconds: float
    peak_gb: float
    """The largest memory of the process, in GB."""
    replicated: dict[str, pl.DataFrame] = Field(default_factory=dict, exclude=True, repr=False)
    """Per site, one row per reported feature: feature, reported, fresh, prompts, failed."""

    def summary(self) -> str:
        """One line: how many learned biases were found, and how many nulls were reported."""
        learned, nulls = [row for row in self.plants if row.learned], [row for row in self.plants if row.null]
        return (
            f"{sum(row.found for row in learned)} of {len(learned)} learned biases found by reported features; "
            f"{sum(bool(row.matched_by) for row in nulls)} of {len(nulls)} clean nulls reported"
        )

    def tables(self) -> dict[str, Rows]:
        """The plants, what matches them, and the figures."""
        tables: dict[str, Rows] = {"planted biases, effects in SD(Δr)": [_outcome(row) for row in self.plants]}
        if matches := [_match(row) for row in self.plants if row.found]:
            tables["what was found"] = matches
        figures = {name.replace("_", " "): value for name, value in self if isinstance(value, Figure)}
        if c := self.calibration:
            figures |= {"reported, shuffled labels": c.shuffled, "reported, random weights": c.random}
            figures["decoys matched"] = c.decoys
        rows: list[dict[str, object]] = [
            {"figure": name, "value": "nothing to count" if f.value is None else f, "n": f.n} for name, f in figures.items()
        ]
        counted = {"concepts": self.concepts}
        if c := self.calibration:
            counted |= {"concepts, shuffled labels": c.shuffled.concepts, "concepts, random weights": c.random.concepts}
        lowest = counted | {"lowest dose found": self.lowest_dose, "seconds": self.seconds, "peak GB": self.peak_gb}
        return tables | {"the audit": rows + [{"figure": name, "value": value, "n": None} for name, value in lowest.items()]}


def _outcome(row: CueResult) -> dict[str, object]:
    why = row.why.removeprefix("feature ").replace("carried by the error", "in the error")  # 80 columns
    outcome = "✓ found" if row.found else f"✗ {why}" if row.learned else why
    if row.null:
        outcome = "✗ reported" if row.matched_by else "✓ not reported"
    kind, effect = row.kind.replace("_", " "), f"{row.ate_sd:+.2f}"
    learned = "learned" if row.learned else "null" if row.null else "neither"
    about: dict[str, object] = {"bias": row.name, "kind": kind, "dose": f"{row.dose:.2f}", "effect": effect}
    return about | {"the PM": learned, "outcome": outcome, "text alone": row.text or ""}


def _match(row: CueResult) -> dict[str, object]:
    f1 = None if row.f1 is None else f"{row.f1:.2f}"
    group = f"{row.group.size}: {_percent(row.group.mediated)}" if row.group else None
    about: dict[str, object] = {"bias": row.name, "site": row.site, "by": _members(row), "rank": row.rank}
    return about | {"F1": f1, "mediated": _percent(row.mediated), "group": group}


def _members(row: CueResult) -> str:
    """The concepts or the features of a match; many features are counted."""
    if row.concepts:
        return f"{'concept' if len(row.concepts) == 1 else 'concepts'} {', '.join(map(str, row.concepts))}"
    return ", ".join(map(str, row.features)) if row.size < SHOWN else f"{row.size} features"


def _percent(figure: Figure | None) -> str | None:
    return None if figure is None or figure.value is None else f"{figure.value:.0%}"
