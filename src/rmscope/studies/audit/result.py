"""What an audit found."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from pydantic import BaseModel, Field

from rmscope.planted.results import CueResult, RecallMetrics
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure


@dataclass(frozen=True, slots=True)
class ReportedShare(Figure):
    """The share of frozen features that a run reports."""

    sd_delta: float = 0.0
    """SD(Δr) of the run's PM."""


@dataclass(frozen=True, slots=True)
class DecoyShare(Figure):
    """The share of decoy cues that reported features match."""

    words: tuple[str, ...] = ()
    """The decoys that are matched."""


class Calibration(BaseModel):
    """What the pipeline reports where nothing was learned."""

    shuffled: ReportedShare
    """A PM that was trained on labels drawn by coin."""
    random: ReportedShare
    """A PM of random weights."""
    decoys: DecoyShare
    """Words that no plant uses, in the audited PM."""


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
    """The share of reported features that SAEs of another seed have too."""
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
        learned = [row for row in self.plants if row.learned]
        nulls = [row for row in self.plants if row.null]
        return (
            f"{sum(row.found for row in learned)} of {len(learned)} learned biases found by reported features; "
            f"{sum(bool(row.matched_by) for row in nulls)} of {len(nulls)} clean nulls reported"
        )

    def tables(self) -> dict[str, Rows]:
        """The plants, what matches them, and the figures."""
        tables: dict[str, Rows] = {"planted biases, effects in SD(Δr)": [_outcome(row) for row in self.plants]}
        if matches := [_match(row) for row in self.plants if row.found]:
            tables["what was found"] = matches
        figures = {name: value for name, value in self if isinstance(value, Figure)}
        if c := self.calibration:
            named = ("reported, shuffled labels", "reported, random weights", "decoys matched")
            figures |= dict(zip(named, (c.shuffled, c.random, c.decoys), strict=True))
        rows: list[dict[str, object]] = [
            {"figure": name.replace("_", " "), "value": "nothing to count" if f.value is None else f, "n": f.n}
            for name, f in figures.items()
        ]
        lowest = {"lowest dose found": self.lowest_dose, "seconds": self.seconds, "peak GB": self.peak_gb}
        rows += [{"figure": name, "value": value, "n": None} for name, value in lowest.items()]
        return tables | {"the audit": rows}


def _outcome(row: CueResult) -> dict[str, object]:
    outcome = "✓ found" if row.found else f"✗ {row.why}" if row.learned else row.why
    if row.null:
        outcome = "✗ reported" if row.matched_by else "✓ not reported"
    return {
        "bias": row.name,
        "kind": row.kind.replace("_", " "),
        "dose": f"{row.dose:.2f}",
        "effect": f"{row.ate_sd:+.2f}",
        "the PM": "learned" if row.learned else "clean null" if row.null else "neither",
        "outcome": outcome,
    }


def _match(row: CueResult) -> dict[str, object]:
    return {
        "bias": row.name,
        "site": row.site,
        "features": row.features,
        "rank": row.rank,
        "F1": None if row.f1 is None else f"{row.f1:.2f}",
        "mediated": _percent(row.mediated),
        "group": f"{len(row.group.features)}: {_percent(row.group.mediated)}" if row.group else None,
    }


def _percent(figure: Figure | None) -> str | None:
    return None if figure is None or figure.value is None else f"{figure.value:.0%}"
