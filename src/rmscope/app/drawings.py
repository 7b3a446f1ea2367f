"""Figures of the app, beside those of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from rmscope.app.bench import Measurement
from rmscope.report.figures import EMPTY, extent, histogram
from rmscope.report.formatting import number

HEIGHT = 72
BINS = 24
LETTERS = "ABCD"


def reach_of(measurements: Sequence[Measurement]) -> float:
    """The largest difference of a prefix's reward from that of the empty completion: full colour."""
    return max((abs(r - m.prefixes[0]) for m in measurements for r in m.prefixes), default=0.0) or 1.0


def reward_span(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """The range of all prefixes' rewards, so that curves of several completions share one scale."""
    return extent((r for m in measurements for r in m.prefixes), pad=0.08)


def prefix_curve(measurement: Measurement, span: tuple[float, float]) -> Markup:
    """The reward of the text after each token, as a line; a dashed line at the reward of the empty completion."""
    rewards = measurement.prefixes
    low, high = span

    def y(reward: float) -> float:
        return round(HEIGHT * (high - reward) / (high - low), 1)

    path = " L".join(f"{i} {y(reward)}" for i, reward in enumerate(rewards))
    name = (
        f"reward from {number(rewards[0], plus=True)} before the first token to {number(rewards[-1], plus=True)} at the end"
    )
    whole = Markup('<svg class="prefix-curve" width="100%" height="{h}" role="img" aria-label="{name}">')
    plot = Markup('<svg viewBox="0 0 {n} {h}" width="100%" height="{h}" preserveAspectRatio="none">')
    start = Markup('<line class="equal" x1="0" x2="{n}" y1="{y}" y2="{y}" vector-effect="non-scaling-stroke"/>')
    curve = Markup('<path class="curve" d="M{path}" vector-effect="non-scaling-stroke"/></svg></svg>')
    values = {"n": max(1, len(rewards) - 1), "h": HEIGHT, "y": y(rewards[0]), "path": path, "name": name}
    return Markup("").join(part.format(**values) for part in (whole, plot, start, curve))


def reach_of_tokens(example: Mapping[str, Any]) -> float:
    """The largest |effect| of a token in either side of an example: full colour."""
    return max((abs(effect) for side in example["sides"] for _, effect in side["effects"]), default=0.0) or 1.0


def order_of(rewards: Iterable[float]) -> str:
    """The completions' letters, the highest reward first."""
    ranked = sorted(enumerate(rewards), key=lambda one: -one[1])
    return " > ".join(LETTERS[i] for i, _ in ranked)


def effect_histograms(effects: Mapping[str, Sequence[float]], name: str) -> dict[str, Markup]:
    """A histogram for each side, with the same bins."""
    values = [v for listed in effects.values() for v in listed]
    if not values:
        return dict.fromkeys(effects, EMPTY)
    edges = np.histogram_bin_edges(values, bins=min(BINS, max(6, len(values) // 8)), range=extent(values, include=[0.0]))
    figures = {}
    for side, listed in effects.items():
        counts = np.histogram(listed, bins=edges)[0].tolist()
        figures[side] = histogram(edges.tolist(), counts, "effect, reward", f"{name}, {side} responses", "responses")
    return figures
