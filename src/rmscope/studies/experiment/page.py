"""The page of an experiment: the verdict, every condition's effect with and without ablation, the texts of one prompt."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from rmscope.report import curves, figures
from rmscope.report.page import environment

MARKS = {"supported": "found", "contradicted": "missed", "undecided": "unscored"}
"""The mark of each verdict in style.css."""
SIGNS = {"supported": "✓", "contradicted": "✕", "undecided": "?"}


def render_experiment(found: dict[str, Any]) -> str:
    """The page of an ``ExperimentResult`` as JSON; names and texts are escaped."""
    rows = [row for row in found["conditions"] if row["effect"]]
    effects = [row[which] for row in rows for which in ("effect", "without") if row[which]]
    ends = [effect[end] for effect in effects for end in ("value", "low", "high")]
    page = (
        environment()
        .get_template("experiment/page.html")
        .render(
            found=found,
            marks=MARKS,
            signs=SIGNS,
            span=figures.extent(ends, include=[0.0, found["bound"], -found["bound"]], pad=0.04),
            trends=[_trend(found, claim) for claim in found["claims"] if claim["says"] in ("rising", "falling")],
            expected={name for claim in found["claims"] for name in claim["conditions"]},
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _trend(found: dict[str, Any], claim: dict[str, Any]) -> tuple[str, Markup]:
    """An ordered list of conditions as a curve; beside it the same with the features ablated, and the baselines."""
    rows = {row["name"]: row for row in found["conditions"]}
    order = [rows[name] for name in claim["conditions"]]
    baselines = [rows[row["against"]] for row in order]

    def points(listed: list[dict[str, Any]], which: str) -> list[tuple[Any, ...]]:
        effects = [(i, row[which]) for i, row in enumerate(listed) if row[which]]
        return [(i, effect["value"], effect["low"], effect["high"]) for i, effect in effects]

    series: list[curves.Series] = [
        ("as it is", 2, points(order, "effect")),
        ("features ablated", 1, points(order, "without")),
    ]
    if len({row["name"] for row in baselines}) > 1:
        series.append(("what it is held against", 4, points(baselines, "effect")))
    marks = [(float(i), row["name"].replace("_", " ")) for i, row in enumerate(order)]
    name = str(claim["claim"])
    return name, curves.banded(series, "condition", "effect, reward", name, marks, found["bound"])
