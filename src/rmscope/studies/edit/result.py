"""What edit and gate find, typed, with their tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmscope.report.formatting import q_value
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure
from rmscope.studies.edit.patch import FeatureEdit

BEFORE, EDIT = "before", "edit"
"""Two of the variants that are measured beside each other: the PM as it is, and the PM with the patch."""
LEVEL = 0.05
"""The gate's largest probability of failing where no concept moved beyond the bound."""
Figures = Mapping[str, Mapping[str, Figure]]
"""Figures by variant, then by name."""


@dataclass(frozen=True, slots=True)
class StyleCell:
    """One cell of RM-Bench: chosen answers in one style, rejected answers in one style; ``accuracy`` and its ``fall``."""

    chosen: str
    rejected: str
    pairs: int
    variants: Figures


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """The figures of ``check.py`` by cue (``ate``, ``gone``), by set of pairs, and by cell of RM-Bench."""

    sd: float
    """SD(Δr) of the run's data."""
    cues: Mapping[str, Figures]
    pairs: Mapping[str, Figures]
    """``accuracy`` and its ``fall``, ``drift`` of Δr in SD(Δr) and its ``correlation`` with Δr before."""
    styles: list[StyleCell]

    def tables(self) -> dict[str, Rows]:
        """Tables for the terminal, by title."""
        tables: dict[str, Rows] = {}
        for cue, figures in self.cues.items():
            title = f"{cue}: effect of the cue on the reward (ate), share of it that is gone"
            tables[title] = _columns(figures, "ate", "gone")
        for name, figures in self.pairs.items():
            tables[f"{name}: accuracy, and its fall"] = _columns(figures, "accuracy", "fall")
            title = f"{name}: drift of Δr in SD(Δr), correlation with Δr before"
            tables[title] = _columns(figures, "drift", "correlation")
        if self.styles:
            tables["RM-Bench by style: accuracy before"] = self._by_style(BEFORE, "accuracy")
            tables["RM-Bench by style: accuracy after"] = self._by_style(EDIT, "accuracy")
            tables["RM-Bench by style: fall of accuracy"] = self._by_style(EDIT, "fall")
        return tables

    def _by_style(self, variant: str, name: str) -> Rows:
        keys = ("chosen", "rejected", "pairs")
        return [{k: getattr(c, k) for k in keys} | {"figure": c.variants[variant][name]} for c in self.styles]


def _columns(figures: Figures, *names: str) -> Rows:
    return [{"variant": variant, **{name: row[name] for name in names}} for variant, row in figures.items()]


@dataclass(frozen=True, slots=True)
class CueChoice(FeatureEdit):
    """The edit that the rule of ``analyse.py`` chose for a cue, the share of the cue's effect that it left, and its loss."""

    cue: str = ""
    left: float = 1.0
    loss: float = 1.0


class EditResult(Result):
    """A patch of ``model``, in the folders ``patch`` and ``export``: what it edits, how that was chosen, what it changes."""

    model: str
    patch: Path
    export: Path | None
    edits: list[FeatureEdit]
    chosen: list[CueChoice]
    """One per cue; empty where the features were named."""
    check: BeforeAfter | None
    seconds: float

    def summary(self) -> str:
        line = f"The patch is in {self.patch}. Load the PM with it: rs.load_edited({self.model!r}, {str(self.patch)!r})."
        code = f" {self.export} contains code: transformers opens it only with trust_remote_code=True."
        return line if self.export is None else line + code

    def tables(self) -> dict[str, Rows]:
        edits = [{"site": e.site, "operation": e.action, "features": ", ".join(map(str, e.features))} for e in self.edits]
        return {"Edits": edits} | (self.check.tables() if self.check else {})


@dataclass(frozen=True, slots=True)
class ConceptMove:
    """A concept's mean Δr over twins in SD(Δr) of each PM; their difference, paired by prompt; p of |move| > bound, as it
    is and with Holm's correction over the concepts."""

    concept: str
    prompts: int
    base: float
    new: float
    move: Figure
    p: float
    holm: float = 1.0
    moved: bool = False


class GateResult(Result):
    """Which concepts' reward moved by more than the bound, in SD(Δr)."""

    base: str
    new: str
    bound: float
    passed: bool
    moved: list[str]
    concepts: list[ConceptMove]
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else 1

    def summary(self) -> str:
        if self.passed:
            return f"No concept is shown to have moved by more than {self.bound:g} SD(Δr)."
        return f"{', '.join(self.moved)} moved by more than {self.bound:g} SD(Δr) (sign flips, Holm, p < {LEVEL})."

    def tables(self) -> dict[str, Rows]:
        rows = [
            {"concept": c.concept, "n": c.prompts, "base": Figure(c.base), "new": Figure(c.new), "move": c.move}
            | {"p": q_value(c.holm), "moved": "yes" if c.moved else "no"}
            for c in self.concepts
        ]
        return {"Effect of each concept in SD(Δr) over n prompts; Holm's p of a move beyond the bound": rows}
