"""The page of ``rmscope evaluate``: several SAEs side by side, one file that opens offline."""

from __future__ import annotations

from typing import Any

from rmscope.report.page import environment

COLUMNS = (
    ("l0", "L0", False), ("fvu", "FVU", True), ("cosine", "Cosine", False), ("norm_ratio", "Norm ratio", False),
    ("dead", "Dead", True), ("reward_recovered", "Reward recovered", True), ("delta_r2", "Δr explained", True),
    ("delta_r2_scaled", "… after a slope", True), ("agreement", "Agreement", True),
)  # fmt: skip
"""(figure, heading, whether it is a share)."""


def render_evaluation(data: dict[str, Any]) -> str:
    """The page of an :class:`~rmscope.studies.evaluate.result.EvaluateResult` as JSON; names and figures are escaped."""
    n = len(data["saes"])
    title = f"{n} SAE{'s' if n > 1 else ''} side by side"
    return environment().get_template("evaluate/page.html").render(title=title, data=data, columns=COLUMNS)
