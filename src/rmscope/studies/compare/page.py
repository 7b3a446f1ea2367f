"""The page of ``rmscope compare``: what the same SAEs see in two PMs, and which rewarded concepts differ between them."""

from __future__ import annotations

from typing import Any

from rmscope.report import curves, figures
from rmscope.report.page import environment


def render_comparison(found: dict[str, Any]) -> str:
    """The page of :func:`rmscope.studies.compare.analyse.compare`'s figures, texts escaped."""
    changed = [row for row in found["concepts"] if row["changed"]]
    ends = [row[f"{v}{end}"] for row in changed for v in "ab" for end in ("", "_low", "_high")]
    page = (
        environment()
        .get_template("compare/page.html")
        .render(
            found=found,
            changed=changed,
            held=sum(bool(row.get("holds")) for row in changed),
            others=[row for row in found["concepts"] if not row["changed"]],
            span=figures.extent(ends, include=[0.0], pad=0.04),
            counts=curves.counts([(row["class"], row["features"]) for row in found["classes"]], "Features by class"),
            scatter=figures.scatter(
                [(row["a"], row["b"]) for row in found["features"] if not found["base"]],
                "ablation effect in A, SD(Δr)", "ablation effect in B, SD(Δr)", "Ablation effects in B against those in A",
            ),
        )
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")
