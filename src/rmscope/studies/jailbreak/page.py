"""The page of ``rmscope jailbreak``: what was made, how often it works on unseen prompts, and what carries it."""

from __future__ import annotations

from typing import Any

from rmscope.report.page import environment

ARMS = {
    "no phrase": "no phrase",
    "features": "phrases of features",
    "features, tokens flipped": "… after the token-level pass",
    "without effect": "phrases of features without effect",
    "without effect, tokens flipped": "… after the token-level pass",
    "shuffled": "the features’ phrases, words shuffled",
    "blind": "phrases drawn blind to features",
    "blind, tokens flipped": "… after the token-level pass",
    "features, own list": "features, a list for each prompt",
    "blind, own list": "blind, a list for each prompt",
}
"""The arms in the order of the page, as it names them."""
SEARCHED = ("features", "blind", "without effect")
SLOTS = {"start": "before", "middle": "in the middle", "end": "after"}


def render_jailbreak(found: dict[str, Any]) -> str:
    """The page from the summary and the examples; all text from models and data is escaped."""
    arms = {arm["arm"]: arm for arm in found["arms"]}
    marks = [10**k for k in range(1, 6)]
    page = (
        environment()
        .get_template("jailbreak/page.html")
        .render(
            found=found,
            arms=[{**arms[name], "name": label} for name, label in ARMS.items() if name in arms],
            main=arms["features"],
            bare=arms["no phrase"],
            proof=next((row for row in found["proof"] if row["jailbreak"] == "features"), None),
            names=ARMS,
            traces=[(name, _steps(found["searches"][name]["trace"])) for name in SEARCHED],
            searched=SEARCHED,
            marks=marks,
            slots=SLOTS,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _steps(trace: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The best success so far against the rewards computed."""
    best, points = 0.0, [(0.0, 0.0)]
    for point in trace:
        best = max(best, point["success"])
        points.append((point["evaluations"], best))
    return points
