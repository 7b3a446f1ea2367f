"""Sufficient by steering: a·d_j added on the whole span, dose after dose, beside other directions of the same norm.

The doses of all features lie on one grid of norms a |d_j|, each a step of √2, so that the same :data:`DIRECTIONS`
directions, run exactly at every norm of the grid, serve every feature. A feature's largest dose is the largest norm of the
grid that does not exceed the 95th percentile of its natural activation (docs/method.md, "Sufficiency"). The directions are
differences of real activations. The dose is chosen on every other prompt and judged on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.completions import Completion, added
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, interval

DIRECTIONS = 20
"""Norm-matched directions; their 95th percentile lies between the first and the second of them."""
STEP = 2**-0.5
DOSES = 12
"""The most norms in the grid."""


@dataclass(frozen=True, slots=True)
class Doses:
    """The grid of norms, ascending, and how many of them each feature takes."""

    norms: Array
    taken: dict[int, int]

    def activations(self, feature: int, norm: float) -> list[float]:
        """A feature's doses as activations; ``norm`` is |d_j|."""
        return (self.norms[: self.taken[feature]] / norm).tolist()


@dataclass(frozen=True, slots=True)
class DosePoint:
    """The mean change of the reward at one dose, with its interval; the median and 95th percentile of other directions."""

    value: float | None
    low: float | None
    high: float | None
    others: float
    others_95: float


@dataclass(frozen=True, slots=True)
class Steering:
    """What steering by a feature does. Figures are in units of reward, on the measuring prompts."""

    sufficient: bool
    dose: int | None
    """The chosen dose, as a place on the curve; None where the feature never fires."""
    effect: Figure | None
    """The change of the reward, in the feature's sign."""
    margin: Figure | None
    """What it exceeds the 95th percentile of the directions by."""
    curve: list[DosePoint]
    activations: list[float]
    """The activation that each point of the curve adds."""


def dose_grid(tops: Mapping[int, float]) -> Doses:
    """The grid for features whose largest norms are ``tops`` (95th percentile of f_j |d_j|); down to half the smallest."""
    largest, least = max(tops.values()), min(t for t in tops.values() if t > 0)
    n = min(DOSES, 1 + int(np.ceil(np.log(least / 2 / largest) / np.log(STEP))))
    norms = largest * STEP ** np.arange(n)[::-1]
    return Doses(norms, {j: int((norms <= top * (1 + 1e-9)).sum()) for j, top in tops.items()})


def unit_differences(rows: Float[Tensor, "twice_n d"]) -> Float[Tensor, "n d"]:
    """Unit directions: each from one real activation to another."""
    return torch.nn.functional.normalize(rows[::2] - rows[1::2], dim=1)


def steer(
    rm: RewardModel,
    sae: Sae,
    site: str,
    completions: Sequence[Completion],
    doses: Doses,
    directions: Float[Tensor, "n d"],
    progress: Progress = silent,
) -> tuple[dict[int, Float[Array, "prompts doses"]], Float[Array, "prompts norms n"]]:
    """Exact changes of the reward: of every feature at its doses, and of the directions at every norm."""
    features = list(doses.taken)
    units = torch.nn.functional.normalize(sae.W_dec[features], dim=1)
    norms = torch.tensor(doses.norms, dtype=torch.float32)
    edits = [norms[: doses.taken[j], None] * unit for j, unit in zip(features, units, strict=True)]
    edits += [norm * directions for norm in norms]
    together = torch.cat(edits)
    rows = []
    for i, completion in enumerate(completions):
        rows.append(added(rm, site, completion, together).double().numpy())
        progress(i + 1, len(completions), f"prompts, {len(together)} edits each")
    parts = np.split(np.stack(rows), np.cumsum([len(e) for e in edits])[:-1], axis=1)
    return dict(zip(features, parts, strict=False)), np.stack(parts[len(features) :], 1)


def judge_steering(
    effects: Float[Array, "prompts doses"],
    others: Float[Array, "prompts norms n"],
    sign: int,
    activations: Sequence[float],
) -> Steering:
    """Whether a feature of this sign beats the 95th percentile of the directions.

    The dose is chosen on the fitting prompts, the even ones. On the others, the margin's interval and the effect's must
    both be above 0.
    """
    if not effects.shape[1]:
        return Steering(False, None, None, None, [], [])
    fitting, measured, beside = sign * effects[::2], sign * effects[1::2], sign * others[1::2, : effects.shape[1]]
    dose = int(fitting.mean(0).argmax())
    effect = interval(measured[:, dose], unit="reward")
    both = np.concatenate([measured[:, dose, None], beside[:, dose]], 1)
    margin = interval(both, statistic=_margin, unit="reward")
    curve = [_point(sign, measured[:, k], beside[:, k]) for k in range(effects.shape[1])]
    return Steering(has_sign(margin, 1) and has_sign(effect, 1), dose, effect, margin, curve, list(activations))


def has_sign(figure: Figure, sign: int) -> bool:
    """Whether the whole 95 % interval is on the sign's side of 0."""
    low = figure.scaled(sign).low
    return low is not None and low > 0


def _margin(rows: Float[Array, "prompts one_and_n"]) -> float:
    means = rows.mean(0)
    return float(means[0] - np.percentile(means[1:], 95))


def _point(sign: int, effects: Float[Array, " prompts"], beside: Float[Array, "prompts n"]) -> DosePoint:
    figure, means = interval(effects).scaled(sign), beside.mean(0)
    median, largest = sign * float(np.median(means)), sign * float(np.percentile(means, 95))
    return DosePoint(figure.value, figure.low, figure.high, median, largest)
