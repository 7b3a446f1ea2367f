"""The result of an evaluation: SAEs side by side on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field, InstanceOf

from rmscope.evaluation.explained import Explained
from rmscope.report import formatting
from rmscope.report.page import Page
from rmscope.report.result import Result, Rows
from rmscope.run.evidence import Histogram
from rmscope.statistics import Figure
from rmscope.studies.evaluate.page import render_evaluation


@dataclass(frozen=True, slots=True)
class SaeEvaluation:
    """One SAE on the pairs."""

    name: str
    """Its site in a run, or the folder from which it was loaded."""
    site: str
    architecture: str
    m: int
    figures: dict[str, Figure]
    """l0, fvu, cosine, norm_ratio, and under splice reward_recovered, delta_r2, delta_r2_scaled, agreement."""
    dead: float
    """Share of features that never fire on these tokens."""
    points: list[tuple[float, float]]
    """(Δr, Δr under splice) of every pair, in units of reward."""
    rarity: Histogram
    """Features by x, where a feature fires on one token in 10^x; dead features are left out."""


class EvaluateResult(Result):
    """SAEs on the same held-out pairs. ``--json`` prints the rows of :attr:`table`."""

    model: str
    data: str
    pairs: int
    prompts: int
    tokens: int
    saes: list[SaeEvaluation]
    explained: list[InstanceOf[Explained]] = Field([], exclude=True, repr=False)
    """With ``curves``: keep K, ablate K and their controls, of each site of the run."""
    run: Path | None = None
    """The run folder, if one was evaluated."""
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per SAE, each figure in three columns: its name, ``_low`` and ``_high``."""
    path: Path | None = Field(None, exclude=True)
    """The file of the page, if it was written."""

    def as_json(self) -> Any:
        return self.table.to_dicts()

    def summary(self) -> str:
        explained = ", ".join(f"{label} {formatting.percent(s.figures['delta_r2'].value)}" for label, s in self._labels())
        line = f"{self.pairs} pairs, {self.prompts} prompts; Δr explained under splice: {explained}."
        if not self.explained:
            return line
        return f"{line} The curves are in {self.run}/effects; rmscope report {self.run} shows them."

    def tables(self) -> dict[str, Rows]:
        def rows(**columns: str) -> Rows:
            return [
                {"SAE": label, **{head: _cell(s.figures[name]) for name, head in columns.items()}}
                for label, s in self._labels()
            ]

        return {
            f"{self.pairs} pairs, {self.tokens} tokens": [
                {"SAE": label, "site": s.site, "family": s.architecture, "features": s.m,
                 "dead": formatting.percent(s.dead)}
                for label, s in self._labels()
            ],
            "Sparsity and reconstruction, 95 % intervals": rows(
                l0="L0", fvu="FVU", cosine="cosine", norm_ratio="norm ratio"
            ),
            "Reward under splice, 95 % intervals": rows(
                reward_recovered="recovered", delta_r2="Δr explained", delta_r2_scaled="after a slope", agreement="agreement"
            ),
        }  # fmt: skip

    def _labels(self) -> list[tuple[str, SaeEvaluation]]:
        return list(zip(short_names([s.name for s in self.saes]), self.saes, strict=True))

    def page(self) -> Page | None:
        return self.show() if self.path is not None else None

    def show(self) -> Page:
        """The page, inline in a notebook; it has a file only where ``out`` was given."""
        return Page(render_evaluation(self.model_dump(mode="json")), self.path or Path("evaluation.html"))


def _cell(figure: Figure) -> str:
    """The value, and below it its interval."""
    return "\n".join(formatting.estimate(figure.value, figure.low, figure.high))


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart, else the parts in which the paths differ."""
    last = [Path(p).name for p in paths]
    if len(set(last)) == len(last):
        return last
    parts = [Path(p).parts for p in paths]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), 0)
    return [str(Path(*p[start : len(p) - end])) for p in parts]
