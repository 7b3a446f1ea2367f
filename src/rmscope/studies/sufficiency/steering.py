"""Sufficient by steering: a·d_j added on the whole span, dose after dose, beside other directions of the same norm.

The doses of all features lie on one grid of norms a |d_j|, each a step of √2, so that the same :data:`DIRECTIONS`
directions, run exactly at every norm of the grid, stand beside every feature. A feature's largest dose is the largest
norm of the grid that does not exceed the 95th percentile of its natural activation (METHOD, "Contributes, sufficient").
The directions are differences of real activations. The dose is chosen on every other prompt and judged on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.completions import Completion, added
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array, bootstrap, mean_interval

DIRECTIONS = 20
"""Norm-matched directions; their 95th percentile lies between the first and the second of them."""
STEP = 2**-0.5
DOSES = 12
"""At most so many norms in the grid."""


@dataclass(frozen=True, slots=True)
class Doses:
    """The grid of norms, ascending, and how many of them each feature takes."""

    norms: Array
    taken: dict[int, int]


def grid(tops: Mapping[int, float]) -> Doses:
    """The grid for features whose largest norm (95th percentile of f_j times |d_j|) is ``tops``; down to half the least."""
    largest, least = max(tops.values()), min(t for t in tops.values() if t > 0)
    n = min(DOSES, 1 + int(np.ceil(np.log(least / 2 / largest) / np.log(STEP))))
    norms = largest * STEP ** np.arange(n)[::-1]
    return Doses(norms, {j: int((norms <= top * (1 + 1e-9)).sum()) for j, top in tops.items()})


def differences_of(rows: Float[Tensor, "twice_n d"]) -> Float[Tensor, "n d"]:
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
    effects: Float[Array, "prompts doses"], others: Float[Array, "prompts norms n"], sign: int
) -> dict[str, Any]:
    """Whether a feature of this sign beats the 95th percentile of the directions at the dose chosen on the fitting prompts.

    ``margin`` is what it exceeds them by, in its sign; sufficient where the margin's interval lies above 0 and the
    effect's too. The curve's figures are those of the measuring prompts, in units of reward.
    """
    if not effects.shape[1]:
        return {"sufficient": False, "dose": None, "effect": None, "margin": None, "curve": []}
    fitting, measured, beside = sign * effects[::2], sign * effects[1::2], sign * others[1::2, : effects.shape[1]]
    dose = int(fitting.mean(0).argmax())
    both = np.concatenate([measured[:, dose, None], beside[:, dose]], 1)
    low, high = bootstrap(both, np.arange(len(both)), _margin)
    at_least, at_most = mean_interval(measured[:, dose])
    curve = [_point(sign, measured[:, k], beside[:, k]) for k in range(effects.shape[1])]
    return {
        "sufficient": bool(low > 0 and at_least > 0),
        "dose": dose,
        "effect": {"value": float(measured[:, dose].mean()), "low": at_least, "high": at_most},
        "margin": {"value": _margin(both), "low": low, "high": high},
        "curve": curve,
    }


def _margin(rows: Float[Array, "prompts one_and_n"]) -> float:
    means = rows.mean(0)
    return float(means[0] - np.percentile(means[1:], 95))


def _point(sign: int, effects: Float[Array, " prompts"], beside: Float[Array, "prompts n"]) -> dict[str, float]:
    low, high = sorted(sign * v for v in mean_interval(effects))
    means = beside.mean(0)
    return {
        "value": sign * float(effects.mean()), "low": low, "high": high,
        "others": sign * float(np.median(means)), "others_95": sign * float(np.percentile(means, 95)),
    }  # fmt: skip
