"""The result of the sufficiency study: each site's features and counts, whether text agrees with ablation, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup
from pydantic import Field

from rmscope.report import figures
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure, interval
from rmscope.studies.sufficiency.contexts import Agreement
from rmscope.studies.sufficiency.insertion import Insertion, Steering, has_sign

HALF = 0.5
"""An interaction of this share of R_j is a reason."""
FEWEST_PROMPTS = 5
"""A feature that fires on fewer fresh prompts is not judged by its ablation."""
KINDS = (
    ("sufficient", "by steering and by text"), ("sufficient", "by steering"), ("sufficient", "by text"),
    ("contributes only", "redundant"), ("contributes only", "only in concert"),
    ("contributes only", "conditional on context"), ("contributes only", "no reason found"),
    ("does not contribute", "fresh ablations hold 0"), ("does not contribute", "fires on too few fresh prompts"),
)  # fmt: skip
"""What a feature can be, and by what or why. A feature that is sufficient need not contribute."""


@dataclass(frozen=True, slots=True)
class FeatureSufficiency:
    """A reported feature. Figures are means over fresh responses in which it fires, in units of reward."""

    feature: int
    sign: int
    """The frozen sign of its mean effect."""
    flags: list[str]
    kind: str
    why: str
    contributes: bool
    n: int
    """Fresh responses."""
    ablation: Figure
    interaction: Figure
    """Ablation once the other features of its sign are gone, minus ablation alone."""
    doubled: Figure
    steering: Steering
    text: Insertion
    tokens: list[tuple[str, float]] = field(default_factory=list)
    """The tokens it is most active on, with their share of its activation."""


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many features are of a kind; ``flagged`` of them carry a flag."""

    kind: str
    why: str
    features: int
    flagged: int


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
    model: str
    data: str
    sd: float
    """SD(Δr)."""
    seconds: float
    table: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per feature, without its curve."""
    contexts: pl.DataFrame = Field(exclude=True, repr=False)
    """One row per feature and response (:data:`rmscope.studies.sufficiency.contexts.SCHEMA`)."""
    folder: Path = Field(exclude=True, repr=False)
    """Where the result is written."""

    def summary(self) -> str:
        n, contribute = len(self.features), sum(row.contributes for row in self.features)
        suffice = sum(row.kind == "sufficient" for row in self.features)
        return f"{self.site}: {suffice} of {n} reported features are sufficient, {contribute} contribute ({self.seconds} s)"

    def tables(self) -> dict[str, Rows]:
        """How many features are of each kind, and the agreement of text with ablation."""
        kinds = [{"kind": f"{row.kind}: {row.why}", "features": row.features} for row in self.counts]
        tables: dict[str, Rows] = {f"{len(self.features)} reported features at {self.site}": kinds}
        return tables | _agreement_table(self.agreement, self.site)

    def page(self) -> Page:
        """The page; all texts are escaped."""
        found = self.model_dump(mode="json")
        counts = figures.count_bars([(row.why, row.features) for row in self.counts], "Features by kind")
        points = [(ablation, text) for _, text, ablation in self.agreement.points]
        titles = "mean R_j, reward", "mean change by the text, reward", "Change by the text against R_j"
        scatter = figures.scatter(points, *titles)
        html = render("sufficiency/page.html", found=found, dose_curve=dose_curve, counts=counts, scatter=scatter)
        return Page(html, self.folder / f"{self.site}.html")


class SufficiencyResult(Result):
    """The result at every site, and over all sites."""

    sites: list[SiteSufficiency]
    agreement: Agreement | None = None
    """Agreement of text with ablation over features of all sites, where there are several."""

    def summary(self) -> str:
        return "; ".join(site.summary() for site in self.sites)

    def tables(self) -> dict[str, Rows]:
        tables = {title: rows for site in self.sites for title, rows in site.tables().items()}
        return tables | (_agreement_table(self.agreement, "all sites") if self.agreement is not None else {})

    def page(self) -> Page:
        """The page of the first site; every site has one, ``result.sites[i].page()``."""
        return self.sites[0].page()


def _agreement_table(agreement: Agreement, where: str) -> dict[str, Rows]:
    """The three figures of an agreement; nothing where there are too few features."""
    named = {"pearson": agreement.pearson, "spearman": agreement.spearman, "same sign": agreement.same_sign}
    rows = [{"agreement": name, "value": figure} for name, figure in named.items() if figure is not None]
    return {f"text against R_j, {where}": rows} if rows else {}


def dose_curve(row: Mapping[str, Any]) -> Markup:
    """The reward against the dose: the feature with its interval, and the other directions' median and 95th percentile."""
    points = [(0.0, dict.fromkeys(("value", "low", "high", "others", "others_95"), 0.0))]
    points += zip(row["steering"]["activations"], row["steering"]["curve"], strict=True)
    return figures.band_curves(
        [
            ("this feature", 1 if row["sign"] > 0 else 2, [(a, p["value"], p["low"], p["high"]) for a, p in points]),
            ("others, 95th percentile", 4, [(a, p["others_95"]) for a, p in points]),
            ("others, median", 3, [(a, p["others"]) for a, p in points]),
        ],
        "activation added on the span",
        "change of the reward",
        f"Reward against the dose of feature {row['feature']}",
    )


def classify(
    feature: int, sign: int, flags: list[str], steering: Steering, text: Insertion, contexts: pl.DataFrame
) -> FeatureSufficiency:
    """A feature's kind and figures; ``contexts`` are its rows of ``measure_contexts``."""
    prompts = contexts["prompt"].to_numpy()
    alone, beside, twice = (contexts[c].to_numpy() * sign for c in ("ablation", "ablation_beside", "doubled"))
    ablation, interaction, doubled = (interval(v, prompts).scaled(sign, "reward") for v in (alone, beside - alone, twice))
    seen = len(np.unique(prompts)) >= FEWEST_PROMPTS
    contributes = seen and has_sign(ablation, sign)
    ways = [way for way, found in (("by steering", steering), ("by text", text)) if found.sufficient]
    if ways:
        kind, why = "sufficient", " and ".join(ways)
    elif contributes:
        kind, why = "contributes only", reason(ablation, interaction, doubled, sign)
    else:
        kind, why = "does not contribute", "fresh ablations hold 0" if seen else "fires on too few fresh prompts"
    return FeatureSufficiency(
        feature, sign, flags, kind, why, contributes, len(alone), ablation, interaction, doubled, steering, text
    )


def reason(ablation: Figure, interaction: Figure, doubled: Figure, sign: int) -> str:
    """Why a feature that contributes is not sufficient (docs/method.md, "Sufficiency")."""
    if _at_least_half(interaction, ablation, sign):
        return "redundant"
    if _at_least_half(interaction, ablation, -sign):
        return "only in concert"
    return "conditional on context" if _at_least_half(doubled, ablation, sign) else "no reason found"


def _at_least_half(figure: Figure, ablation: Figure, sign: int) -> bool:
    """Whether a figure surely has the sign, and is half as large as the ablation effect or larger."""
    if figure.value is None or ablation.value is None:
        return False
    return has_sign(figure, sign) and sign * figure.value >= HALF * abs(ablation.value)


def count_kinds(rows: Sequence[FeatureSufficiency]) -> list[KindCount]:
    """One count per kind, in the order of :data:`KINDS`."""
    having = {known: [row for row in rows if (row.kind, row.why) == known] for known in KINDS}
    return [KindCount(*known, len(listed), sum(bool(row.flags) for row in listed)) for known, listed in having.items()]


def as_table(rows: Sequence[FeatureSufficiency]) -> pl.DataFrame:
    """One row per feature, without its curve: figures with the ends of their intervals, steering and text."""
    flat: list[dict[str, object]] = []
    for row in rows:
        one = {name: getattr(row, name) for name in ("feature", "sign", "kind", "why", "contributes", "n")}
        for name in ("ablation", "interaction", "doubled"):
            figure = getattr(row, name)
            one |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        margin, effect, share = row.steering.margin, row.text.effect, row.text.taken_back
        one |= {"steering": row.steering.sufficient, "margin": margin.value if margin else None}
        one |= {"text": row.text.sufficient, "sentence": row.text.sentence}
        one |= {"text_effect": effect.value if effect else None, "taken_back": share.value if share else None}
        flat.append(one)
    return pl.DataFrame(flat, infer_schema_length=None)
