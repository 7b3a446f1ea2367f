"""What edit and gate find, typed, with their tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmscope.report.formatting import q_value
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure
from rmscope.studies.edit.patch import FeatureEdit, Operation

BEFORE, EDIT = "before", "edit"
"""Two of the variants that are measured beside each other: the PM as it is, and the PM with the patch."""
LEVEL = 0.05
"""The gate's largest probability of failing where no concept moved beyond the bound."""


@dataclass(frozen=True, slots=True)
class CueFigures:
    """What a cue does to the reward under one variant."""

    ate: Figure
    """Mean Δr over the cue's twins, in units of reward."""
    gone: Figure
    """The share of the cue's ATE that the variant takes away."""


@dataclass(frozen=True, slots=True)
class StyleFigures:
    """Accuracy on pairs under one variant."""

    accuracy: Figure
    fall: Figure
    """Accuracy before minus accuracy under the variant, paired."""


@dataclass(frozen=True, slots=True)
class PairFigures(StyleFigures):
    """Accuracy on pairs, and how far their Δr moved."""

    drift: Figure
    """Mean |change of Δr|, in SD(Δr) of the PM as it is."""
    correlation: Figure
    """Of Δr before and under the variant."""


@dataclass(frozen=True, slots=True)
class StyleCell:
    """One cell of RM-Bench: chosen answers in one style, rejected answers in one style."""

    chosen: str
    rejected: str
    pairs: int
    variants: Mapping[str, StyleFigures]


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """Figures by name and variant: of each cue, of each set of pairs, of each cell of RM-Bench."""

    sd: float
    """SD(Δr) of the run's data."""
    cues: Mapping[str, Mapping[str, CueFigures]]
    pairs: Mapping[str, Mapping[str, PairFigures]]
    styles: list[StyleCell]

    def tables(self) -> dict[str, Rows]:
        """Tables for the terminal, by title."""
        tables: dict[str, Rows] = {
            f"{cue}: effect of the cue on the reward (ate), share of it that is gone": [
                {"variant": v, "ate": row.ate, "gone": row.gone} for v, row in rows.items()
            ]
            for cue, rows in self.cues.items()
        }
        for name, pairs in self.pairs.items():
            tables[f"{name}: accuracy, and its fall"] = [
                {"variant": v, "accuracy": row.accuracy, "fall": row.fall} for v, row in pairs.items()
            ]
            tables[f"{name}: drift of Δr in SD(Δr), correlation with Δr before"] = [
                {"variant": v, "drift": row.drift, "correlation": row.correlation} for v, row in pairs.items()
            ]
        if self.styles:
            tables["RM-Bench by style: accuracy before"] = [_style_row(c, c.variants[BEFORE].accuracy) for c in self.styles]
            tables["RM-Bench by style: accuracy after"] = [_style_row(c, c.variants[EDIT].accuracy) for c in self.styles]
            tables["RM-Bench by style: fall of accuracy"] = [_style_row(c, c.variants[EDIT].fall) for c in self.styles]
        return tables


def _style_row(cell: StyleCell, figure: Figure) -> Mapping[str, str | int | Figure]:
    return {"chosen": cell.chosen, "rejected": cell.rejected, "pairs": cell.pairs, "figure": figure}


@dataclass(frozen=True, slots=True)
class CueChoice:
    """The edit that the rule chose for a cue. ``left`` and ``loss`` are defined in ``choice.py``."""

    cue: str
    site: str
    operation: Operation
    value: float
    features: tuple[int, ...]
    left: float
    loss: float


class EditResult(Result):
    """A patch: what it edits, how that was chosen, and what it changes."""

    model: str
    """The PM that the patch is for."""
    patch: Path
    """The folder of the patch."""
    export: Path | None
    """The folder for plain transformers, if one was written."""
    edits: list[FeatureEdit]
    chosen: list[CueChoice]
    """One per cue; empty where the features were named."""
    check: BeforeAfter | None
    seconds: float

    def summary(self) -> str:
        line = f"The patch is in {self.patch}. Load the PM with it: rs.load_edited({self.model!r}, {str(self.patch)!r})."
        if self.export is None:
            return line
        return f"{line} {self.export} contains code: transformers opens it only with trust_remote_code=True."

    def tables(self) -> dict[str, Rows]:
        edits: Rows = [
            {"site": e.site, "operation": e.action, "features": ", ".join(map(str, e.features))} for e in self.edits
        ]
        return {"Edits": edits, **(self.check.tables() if self.check else {})}


@dataclass(frozen=True, slots=True)
class ConceptMove:
    """What a concept does to the reward of two PMs."""

    concept: str
    prompts: int
    base: float
    """Mean Δr over the concept's twins under the base PM, in its SD(Δr)."""
    new: float
    """The same under the new PM, in its own SD(Δr)."""
    move: Figure
    """new - base, paired by prompt."""
    p: float
    """Of |move| > bound."""
    holm: float
    """p with Holm's correction over the concepts."""
    moved: bool


class GateResult(Result):
    """Which concepts' reward moved by more than the bound."""

    base: str
    new: str
    bound: float
    passed: bool
    moved: list[str]
    """Names of the concepts that moved."""
    concepts: list[ConceptMove]
    seconds: float

    @property
    def exit_code(self) -> int:
        """1 where a concept moved."""
        return 0 if self.passed else 1

    def summary(self) -> str:
        if self.passed:
            return f"No concept is shown to have moved by more than {self.bound:g} SD(Δr)."
        return f"{', '.join(self.moved)} moved by more than {self.bound:g} SD(Δr) (sign flips, Holm, p < {LEVEL})."

    def tables(self) -> dict[str, Rows]:
        title = "Effect of each concept in SD(Δr) over n prompts; Holm's p of a move beyond the bound"
        return {title: list(map(_gate_row, self.concepts))}


def _gate_row(c: ConceptMove) -> Mapping[str, str | int | Figure]:
    return {
        "concept": c.concept, "n": c.prompts, "base": Figure(c.base), "new": Figure(c.new), "move": c.move,
        "p": q_value(c.holm), "moved": "yes" if c.moved else "no",
    }  # fmt: skip
