"""What the single steps tell: named figures, tables, the closing tables of a run, a ledger, a ranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import polars as pl
from pydantic import BaseModel, Field

from rmscope.evaluation.text_baseline import Term
from rmscope.planted.results import CueMatch
from rmscope.ranking.confirm import power_statement
from rmscope.report.formatting import share
from rmscope.report.page import Page, concept_group, shown_effect, visible
from rmscope.report.result import Result, Rows
from rmscope.run.evidence import Evidence, SiteEvidence
from rmscope.run.run import Run
from rmscope.statistics import Figure

BEST = 8
"""Reported features of each site in the closing table."""
KEPT = ("feature", "rank", "mean_effect", "ci_low", "ci_high", "q", "n", "strong_effect", "q_strong", "flags")
"""Columns of a reported feature in JSON."""
TOLD = ("concept", "name", "form", "site", "features", "rank", "mean_effect", "ci_low", "ci_high", "q", "n", "flags")
"""Columns of a reported concept in JSON."""


class Figures(Result):
    """Named figures, told as a table of two columns."""

    title: str = Field(exclude=True)
    figures: dict[str, Any]

    def summary(self) -> str:
        return self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: [{"figure": name.replace("_", " "), "value": value} for name, value in self.figures.items()]}

    def as_json(self) -> Any:
        return self.model_dump(mode="json")["figures"]


class TextSummary(Result):
    """What text statistics alone explain of Δr."""

    model: str
    data: str
    terms: list[Term]
    explained: Figure
    """delta_r2 on pairs of other prompts than those that chose the terms."""
    agreement: Figure
    """The share of those pairs whose order it gives."""
    pairs: int

    def summary(self) -> str:
        explained, agreed = (" ".join(share(f.value, f.low, f.high)) for f in (self.explained, self.agreement))
        return (
            f"{len(self.terms)} words, phrases and counts explain {explained} of Δr on {self.pairs:,} fresh pairs of "
            f"{self.data}, and order {agreed} of them as {self.model} does."
        )

    def tables(self) -> dict[str, Rows]:
        rows = [{"term": t.name, "reward per unit": t.coefficient, "prompts": t.prompts} for t in self.terms]
        return {"Text statistics, in the order in which they were chosen": rows}


class Frame(Result):
    """A table of effects or the like, of which the terminal shows the first rows."""

    title: str = Field(exclude=True)
    note: str = Field("", exclude=True)
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]]
    shown: int = Field(20, exclude=True)
    name: str = Field("rows", exclude=True)
    """What the rows are called in JSON; empty where they are all of it."""

    def summary(self) -> str:
        return self.note or self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: self.rows[: self.shown]}

    def as_json(self) -> Any:
        return {**self.figures, self.name: self.rows} if self.name else self.rows


class Examination(Result):
    """The checks of a PM."""

    model: str
    identity: str
    noise_floor: float
    checks: list[dict[str, str]]

    def summary(self) -> str:
        counts = {s: sum(c["status"] == s for c in self.checks) for s in ("ok", "warn", "fail")}
        return f"{self.model}: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"

    def tables(self) -> dict[str, Rows]:
        return {self.model: self.checks}

    @property
    def exit_code(self) -> int:
        return int(any(c["status"] == "fail" for c in self.checks))


class LedgerResult(Result):
    """Shares of Δr over a run's pairs, or one pair's ledger."""

    site: str
    pairs: int
    shares: list[dict[str, Any]] = []
    by_length: list[dict[str, Any]] = []
    by_source: list[dict[str, Any]] = []
    ledger: dict[str, Any] = {}
    features: list[dict[str, Any]] = []

    def summary(self) -> str:
        if self.ledger:
            return f"{self.ledger['pair']} at {self.site}: Δr {self.ledger['delta_r']:+.3f}"
        told = ", ".join(f"{row['part']} {row['value']:.0%}" for row in self.shares)
        return f"Δr at {self.site} over {self.pairs} pairs: {told}"

    def tables(self) -> dict[str, Rows]:
        if self.ledger:
            largest = "the largest contributions (effect on the side's own reward)"
            return {f"{self.ledger['pair']} at {self.site}": [self.ledger], largest: self.features}
        return {"share of Δr": self.shares, "by length": self.by_length, "by source": self.by_source}

    def as_json(self) -> Any:
        return {name: value for name, value in self.model_dump(mode="json").items() if value or not self.ledger}


GROUPS = {
    "content": "what it rewards",
    "nonspecific": "not specific: moves unrelated completions too",
    "form": "form: endings, punctuation, position",
}


class RunSummary(Result):
    """The best reported features up and down, the planted biases, where the report is."""

    evidence: Evidence = Field(exclude=True, repr=False)
    report: Page = Field(exclude=True, repr=False)

    @classmethod
    def of(cls, run: Run) -> RunSummary:
        return cls(evidence=run.evidence, report=run.show())

    def page(self) -> Page:
        return self.report

    def summary(self) -> str:
        s, e = self.evidence.scores, self.evidence
        a, reported = s.accuracy, sum(site.reported for site in e.sites)
        groups = [concept_group(c.model_dump()) for c in e.concepts if c.reported]
        text = f"{e.title}: accuracy {a.value:.3f} [{a.low:.3f}, {a.high:.3f}] (length alone {s.length_only:.3f}), "
        text += f"SD(Δr) {s.sd_delta:.3g}; {len(groups)} concepts ({groups.count('content')} of content) and "
        text += f"{reported} features reported"
        if e.planted:
            learned = [p for p in e.planted if p.learned]
            text += f"; {sum(p.found for p in learned)} of {len(learned)} planted biases found"
        return text

    def tables(self) -> dict[str, Rows]:
        listed: dict[str, Rows] = {}
        told = [c for c in self.evidence.concepts if c.reported]
        for group, title in GROUPS.items():
            if rows := [_concept_row(c.model_dump()) for c in told if concept_group(c.model_dump()) == group]:
                listed[f"{title}: {len(rows)} concepts"] = rows
        for site in self.evidence.sites if not told else ():
            rows = [_feature_row(f.model_dump()) for f in site.features if f.reported][:BEST]
            if rows:
                listed[f"{site.site}: {site.reported} of {site.frozen} reported, {site.flagged} with a flag"] = rows
        listed["sites"] = [_site_row(site) for site in self.evidence.sites]
        if self.evidence.planted:
            names = {c.concept: c.name for c in self.evidence.concepts}
            listed["planted biases"] = [_planted_row(p, names) for p in self.evidence.planted]
        return listed

    def as_json(self) -> Any:
        e = self.evidence.model_dump(mode="json")
        return {
            "run": str(self.report.path.parent),
            "scores": {k: v for k, v in e["scores"].items() if k != "histogram"},
            "sites": [
                {
                    "site": s["site"],
                    "quality": s["quality"],
                    "shares": s["ledger"] and s["ledger"]["shares"],
                    "reported": [{k: f[k] for k in KEPT} for f in s["features"] if f["reported"]],
                }
                for s in e["sites"]
            ],
            "concepts": [{k: c[k] for k in TOLD} for c in e["concepts"] if c["reported"]],
            "planted": e["planted"],
            "seconds": round(e["footer"]["seconds"], 1),
        }


def _feature_row(feature: dict[str, Any]) -> dict[str, Any]:
    value, low, high, q = shown_effect(feature)
    tokens = "  ".join(visible(t) for t, _ in feature["tokens"][:4])
    return {
        "rank": feature["rank"],
        "feature": feature["feature"],
        "mean effect": f"{value:+.3f} [{low:+.3f}, {high:+.3f}]",
        "q": f"{q:.1g}",
        "fires on": tokens + (" (where it fires hardest)" if "strong" in feature["flags"] else ""),
    }


def _concept_row(concept: dict[str, Any]) -> dict[str, Any]:
    value, low, high, q = shown_effect(concept)
    return {
        "concept": concept["name"] + (" (where it fires hardest)" if "strong" in concept["flags"] else ""),
        "joint effect": f"{value:+.2f} [{low:+.2f}, {high:+.2f}]",
        "q": f"{q:.1g}",
        "sites": concept["site"] + (f" +{len(concept['elsewhere'])}" if concept["elsewhere"] else ""),
    }


def _site_row(site: SiteEvidence) -> dict[str, Any]:
    row = {"site": site.site, "Spearman of the estimate": site.quality["spearman_median"]}
    if site.written is not None:
        w = site.written
        return row | {
            "written so far": f"{w.written.value:.0%}",
            "explained of it": f"{w.explained_of_written.value:.0%}",
            "by concepts": f"{w.by_concepts.value:.0%}",
        }
    shares = {s.part: f"{s.value:.0%}" for s in site.ledger.shares} if site.ledger else {}
    return row | {f"Δr = {part}": shares.get(part, "") for part in ("features", "error", "remainder")}


def _planted_row(p: CueMatch, names: Mapping[int, str]) -> dict[str, Any]:
    by = (
        " + ".join(names[c] for c in p.concepts)
        or f"{'feature' if p.size == 1 else 'features'} {', '.join(map(str, p.features))} at {p.site}"
    )
    return {
        "": "found" if p.found else "missed",
        "bias": p.name,
        "effect": f"{p.ate.value:+.2f}",
        "by": by if p.found else p.why,
        "F1": f"{p.f1:.2f}" if p.f1 is not None else "",
        "mediated": f"{p.mediated.value:.0%}" if p.mediated else "",
    }


By = Literal["effect", "preference"]
COLUMNS: dict[By, tuple[str, ...]] = {
    "effect": ("rank", "feature", "reported", "mean_effect", "ci_low", "ci_high", "q", "n"),
    "preference": ("feature", "prefers", "mean_diff", "diff_low", "diff_high", "q_diff", "length_corr", "n"),
}


class SiteRanking(BaseModel):
    """The frozen features of a site, in order."""

    site: str
    by: By
    power: str
    features: list[dict[str, Any]]
    interactions: list[dict[str, Any]] | None = None
    groups: list[dict[str, Any]] | None = None

    @property
    def title(self) -> str:
        """How many features passed the test; flagged ones are counted apart."""
        verb, column = {"effect": ("drive reward", "reported"), "preference": ("drive preference", "prefers")}[self.by]
        flags = [f["flags"] for f in self.features if f[column]]
        counts = ", ".join(f"{flag} {n}" for flag, n in Counter(flag for listed in flags for flag in listed).most_common())
        plain = sum(not listed for listed in flags)
        told = f"{self.site}: {len(flags)} of {len(self.features)} frozen features {verb} (q < .05), {plain} without a flag"
        return told + (f", {len(flags) - plain} with ({counts})" if counts else "")


class Ranking(Result):
    """The rankings of some sites."""

    sites: list[SiteRanking]
    top: int

    @classmethod
    def of(cls, run: Run, sites: list[str], by: By, top: int) -> Ranking:
        rows = []
        for site in sites:
            features = run.features(site)
            ordered = features.sort("rank") if by == "effect" else preference_order(features)
            power = power_statement(features, run.sd)
            rows.append(SiteRanking(site=site, by=by, power=power, features=ordered.to_dicts()))
        return cls(sites=rows, top=top)

    def summary(self) -> str:
        return "\n".join(f"{s.site}: {s.power}" for s in self.sites)

    def tables(self) -> dict[str, Rows]:
        listed: dict[str, Rows] = {}
        for s in self.sites:
            listed[s.title] = [
                {**{name: f[name] for name in COLUMNS[s.by]}, "flags": " ".join(f["flags"])} for f in s.features[: self.top]
            ]
            if s.interactions is not None:
                listed[f"{s.site}: ablated in pairs, the largest interactions"] = s.interactions[: self.top]
                listed[f"{s.site}: ablated as a group"] = s.groups or []
        return listed

    def as_json(self) -> Any:
        return [row.model_dump(mode="json", exclude_none=True) for row in self.sites]


def preference_order(features: pl.DataFrame) -> pl.DataFrame:
    """Those that drive preference first, the largest |mean difference| first."""
    return features.sort("prefers", pl.col("mean_diff").abs(), "feature", descending=[True, True, False])
