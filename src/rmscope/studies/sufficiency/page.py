"""The page of the sufficiency study: how many features are of each kind, their curves, and text against R_j."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rmscope.report import curves, figures
from rmscope.report.page import environment


def render_sufficiency(found: dict[str, Any]) -> str:
    """The page of a ``SiteSufficiency`` as JSON; texts are escaped."""
    rows = [{**row, "curve": dose_curve(row)} for row in found["features"]]
    page = (
        environment()
        .get_template("sufficiency/page.html")
        .render(
            found=found,
            rows=rows,
            total=len(rows),
            puzzle=[row for row in rows if row["contributes"] and row["kind"] != "sufficient"],
            contributes=sum(row["contributes"] for row in rows),
            sufficient=sum(row["kind"] == "sufficient" for row in rows),
            counts=count_figure(found["counts"]),
            scatter=figures.scatter(
                [point[2:0:-1] for point in found["agreement"]["points"]],
                "mean R_j, reward", "mean change by the text, reward", "Change by the text against R_j",
            ),
        )
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")


def count_figure(counts: Sequence[Mapping[str, Any]]) -> Markup:
    """How many reported features are of each kind."""
    return curves.counts([(row["why"], row["features"]) for row in counts], "Features by kind")


def dose_curve(row: Mapping[str, Any]) -> Markup:
    """The reward against the dose: the feature with its interval, and the other directions' median and 95th percentile."""
    points = list(zip(row["steering"]["activations"], row["steering"]["curve"], strict=True))
    start = [(0.0, 0.0, 0.0, 0.0)]
    return curves.banded(
        [
            ("this feature", 1 if row["sign"] > 0 else 2, start + [(a, p["value"], p["low"], p["high"]) for a, p in points]),
            ("others, 95th percentile", 4, [(0.0, 0.0), *((a, p["others_95"]) for a, p in points)]),
            ("others, median", 3, [(0.0, 0.0), *((a, p["others"]) for a, p in points)]),
        ],
        "activation added on the span",
        "change of the reward",
        f"Reward against the dose of feature {row['feature']}",
    )
