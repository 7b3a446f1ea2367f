"""The result of an evaluation: SAEs side by side on the same pairs; and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field, InstanceOf

from rmscope.evaluation.explained import Explained
from rmscope.evaluation.reconstruction import Evaluation, as_table
from rmscope.report import formatting
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows

BINS = 24
"""Bars of the histogram of firing rates."""


class EvaluateResult(Result):
    """SAEs on the same held-out pairs. ``--json`` prints the rows of :attr:`table`."""

    model: str
    data: str
    pairs: int
    prompts: int
    tokens: int
    saes: list[InstanceOf[Evaluation]] = Field(exclude=True, repr=False)
    """By their site in the run, or the folder from which they were loaded."""
    explained: list[InstanceOf[Explained]] = Field([], exclude=True, repr=False)
    """With ``curves``: keep K, ablate K and their controls, of each site of the run."""
    run: Path | None = None
    """The run folder, if one was evaluated."""
    path: Path | None = Field(None, exclude=True)
    """The file of the page, if it was written."""

    @property
    def table(self) -> pl.DataFrame:
        """One row per SAE, each figure in three columns: its name, ``_low`` and ``_high``."""
        return as_table(self.saes)

    def as_json(self) -> Any:
        return self.table.to_dicts()

    def summary(self) -> str:
        explained = ", ".join(f"{label} {formatting.percent(e.figures['delta_r2'].value)}" for label, e in self._labels())
        curves = f" The curves are in {self.run}/effects; rmscope report {self.run} shows them." if self.explained else ""
        return f"{self.pairs} pairs, {self.prompts} prompts; Δr explained under splice: {explained}.{curves}"

    def tables(self) -> dict[str, Rows]:
        def rows(**columns: str) -> Rows:
            """Each figure, and below it its interval."""
            figures = {label: {head: e.figures[name] for name, head in columns.items()} for label, e in self._labels()}
            return [
                {"SAE": label} | {head: "\n".join(formatting.estimate(f.value, f.low, f.high)) for head, f in row.items()}
                for label, row in figures.items()
            ]

        return {
            f"{self.pairs} pairs, {self.tokens} tokens": [
                {"SAE": n, "site": e.site, "family": e.architecture, "features": e.m, "dead": formatting.percent(e.dead)}
                for n, e in self._labels()
            ],
            "Sparsity and reconstruction, 95 % intervals": rows(
                l0="L0", fvu="FVU", cosine="cosine", norm_ratio="norm ratio"
            ),
            "Reward under splice, 95 % intervals": rows(
                reward_recovered="recovered", delta_r2="Δr explained", delta_r2_scaled="after a slope", agreement="agreement"
            ),
        }  # fmt: skip

    def _labels(self) -> list[tuple[str, Evaluation]]:
        return list(zip(short_names([e.name for e in self.saes]), self.saes, strict=True))

    def page(self) -> Page | None:
        return self.show() if self.path is not None else None

    def show(self) -> Page:
        """The page, inline in a notebook; it has a file only where ``out`` was given."""
        span = (0, np.log10(self.tokens) + 1e-9)
        bars = [np.histogram(-np.log10(e.density[e.density > 0]), BINS, span) for e in self.saes]
        points = [np.stack([e.delta, e.delta_hat], 1) for e in self.saes]
        html = render("evaluate/page.html", data=self, bars=bars, points=points)
        return Page(html, self.path or Path("evaluation.html"))


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
