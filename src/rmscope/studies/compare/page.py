"""The page of ``rmscope compare``: the same SAEs in two PMs, and the rewarded concepts that differ between them."""

from __future__ import annotations

from typing import Any

from rmscope.report import curves, figures
from rmscope.report.page import environment


def render_comparison(data: dict[str, Any]) -> str:
    """The page of a :class:`~rmscope.studies.compare.result.CompareResult` as JSON; texts are escaped."""
    changed = [row for row in data["concepts"] if row["changed"]]
    ends = [row[name][end] for row in changed for name in ("a", "b") for end in ("value", "low", "high")]
    effects = [(row["a"]["value"], row["b"]["value"]) for row in data["features"] if row["a"] and row["b"]]
    page = (
        environment()
        .get_template("compare/page.html")
        .render(
            data=data,
            changed=changed,
            held=sum(bool(row["holds"]) for row in changed),
            others=[row for row in data["concepts"] if not row["changed"]],
            span=figures.extent(ends, include=[0.0], pad=0.04),
            counts=curves.counts([(row["class"], row["features"]) for row in data["classes"]], "Features by class"),
            scatter=figures.scatter(
                effects,
                "ablation effect in A, SD(Δr)",
                "ablation effect in B, SD(Δr)",
                "Ablation effects in B against those in A",
            ),
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")
