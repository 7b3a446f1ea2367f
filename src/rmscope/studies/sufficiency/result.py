"""The result of the sufficiency study: each site's features and counts, and whether text agrees with ablation."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from pydantic import Field

from rmscope.report.page import Page
from rmscope.report.result import Result, Rows
from rmscope.studies.sufficiency.agreement import Agreement
from rmscope.studies.sufficiency.classify import FeatureSufficiency, KindCount
from rmscope.studies.sufficiency.page import render_sufficiency


class SiteSufficiency(Result):
    """The reported features of one site. Figures are in units of reward."""

    site: str
    prompts: int
    """Fresh prompts on which features were steered and sentences inserted."""
    directions: int
    """Other directions beside each feature's."""
    features: list[FeatureSufficiency]
    counts: list[KindCount]
    agreement: Agreement
    model: str = ""
    data: str = ""
    sd: float | None = None
    """SD(Δr)."""
    seconds: float = 0.0
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per feature, without its curve."""
    contexts: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per feature and response (:data:`rmscope.studies.sufficiency.contexts.SCHEMA`)."""
    folder: Path = Field(Path(), exclude=True, repr=False)
    """Where the result is written."""

    def summary(self) -> str:
        contribute = sum(row.contributes for row in self.features)
        sufficient = sum(row.kind == "sufficient" for row in self.features)
        n = len(self.features)
        return (
            f"{self.site}: {sufficient} of {n} reported features are sufficient, {contribute} contribute ({self.seconds} s)"
        )

    def tables(self) -> dict[str, Rows]:
        """How many features are of each kind, and the agreement of text with ablation."""
        kinds = [{"kind": f"{row.kind}: {row.why}", "features": row.features} for row in self.counts]
        tables: dict[str, Rows] = {f"{len(self.features)} reported features at {self.site}": kinds}
        return tables | agreement_table(self.agreement, self.site)

    def page(self) -> Page:
        return Page(render_sufficiency(self.model_dump(mode="json")), self.folder / f"{self.site}.html")


class SufficiencyResult(Result):
    """The result at every site, and over all sites."""

    sites: list[SiteSufficiency]
    agreement: Agreement | None = None
    """Agreement of text with ablation over features of all sites, where there are several."""

    def summary(self) -> str:
        return "; ".join(site.summary() for site in self.sites)

    def tables(self) -> dict[str, Rows]:
        tables: dict[str, Rows] = {}
        for site in self.sites:
            tables |= site.tables()
        return tables | (agreement_table(self.agreement, "all sites") if self.agreement is not None else {})

    def page(self) -> Page:
        """The page of the first site; every site has one, ``result.sites[i].page()``."""
        return self.sites[0].page()


def agreement_table(agreement: Agreement, where: str) -> dict[str, Rows]:
    """The three figures of an agreement; nothing where there are too few features."""
    names = ("pearson", "spearman", "same_sign")
    figures = {name.replace("_", " "): getattr(agreement, name) for name in names if getattr(agreement, name) is not None}
    rows = [{"agreement": name, "value": figure} for name, figure in figures.items()]
    return {f"text against R_j, {where}": rows} if rows else {}
