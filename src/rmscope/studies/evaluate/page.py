"""The page of ``rmscope evaluate``: several SAEs side by side, one file that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rmscope.evaluation.reconstruction import Evaluation
from rmscope.report.page import environment

COLUMNS = (
    ("l0", "L0", False), ("fvu", "FVU", True), ("cosine", "Cosine", False), ("norm_ratio", "Norm ratio", False),
    ("dead", "Dead", True), ("reward_recovered", "Reward recovered", True), ("delta_r2", "Δr explained", True),
    ("delta_r2_scaled", "… after a slope", True), ("agreement", "Agreement", True),
)  # fmt: skip
"""(figure, heading, whether it is a share)."""
BINS = 24


def render_evaluation(found: Sequence[Evaluation], model: str, data: str, prompts: int) -> str:
    """The page; the SAEs in the order given, names and figures escaped."""
    return (
        environment()
        .get_template("evaluate/page.html")
        .render(
            title=f"{len(found)} SAE{'s' if len(found) > 1 else ''} side by side",
            model=model,
            data=data,
            pairs=len(found[0].delta),
            prompts=prompts,
            tokens=found[0].tokens,
            columns=COLUMNS,
            saes=[_view(e) for e in found],
        )
    )


def _view(e: Evaluation) -> dict[str, Any]:
    rare = -np.log10(e.density[e.density > 0])
    counts, edges = np.histogram(rare, BINS, (0, np.log10(e.tokens) + 1e-9))
    return {
        **asdict(e), "dead": e.dead, "points": list(zip(e.delta, e.delta_hat, strict=True)),
        "edges": edges.tolist(), "counts": counts.tolist(),
    }  # fmt: skip
