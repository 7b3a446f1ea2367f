"""The page of ``rmscope jailbreak``: the lists, how often they work on unseen prompts, and which features carry them."""

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
"""The name of each arm on the page, in its order."""
SEARCHES = ("features", "blind", "without effect")
SLOTS = {"start": "before", "middle": "in the middle", "end": "after"}


def render_jailbreak(result: dict[str, Any]) -> str:
    """The page of a result that was dumped as JSON. All text from models and data is escaped."""
    arms = {arm["arm"]: arm for arm in result["arms"]}
    page = (
        environment()
        .get_template("jailbreak/page.html")
        .render(
            result=result,
            arms=[{**arms[name], "name": label} for name, label in ARMS.items() if name in arms],
            main=arms["features"],
            bare=arms["no phrase"],
            mediation=next((row for row in result["mediation"] if row["jailbreak"] == "features"), None),
            names=ARMS,
            traces=[(name, _steps(result["searches"][name]["trace"])) for name in SEARCHES],
            searches=SEARCHES,
            marks=[10**k for k in range(1, 6)],
            slots=SLOTS,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _steps(trace: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The best success so far, by the number of rewards computed."""
    best, points = 0.0, [(0.0, 0.0)]
    for point in trace:
        best = max(best, point["success"])
        points.append((point["evaluations"], best))
    return points
