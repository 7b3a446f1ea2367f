"""Putting a feature in: by steering, beside other directions of the same norm, and by a sentence in which it fires.

The doses of all features are on one grid of norms a |d_j|, each a step of √2, so that the same :data:`DIRECTIONS` directions
(differences of real activations), run exactly at every norm of the grid, serve every feature. A sentence is put at the end
of fresh responses; its effect is the reward with it minus the reward with a neutral sentence of similar length. Dose and
sentence are chosen on every other prompt and judged on the rest (docs/method.md, "Sufficiency").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rmscope.effects.completions import Completion, ablation_effects, active_on, complete, steering_effects
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.planting import FILLERS
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, interval
from rmscope.studies.experiment.conditions import Base
from rmscope.studies.experiment.result import taken_back

DIRECTIONS = 20
"""Norm-matched directions; their 95th percentile is between the first and the second of them."""
STEP, DOSES = 2**-0.5, 12
"""From one norm of the grid to the next smaller one; the most norms in the grid, which ends at half the least top."""
HALF, FIRING_SHARE = 0.5, 0.5
"""The share of a sentence's effect that ablating the feature must take back; that of prompts on which it must fire it."""


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


@dataclass(frozen=True, slots=True)
class Insertion:
    """What a sentence that fires a feature does, on the measuring prompts. ``effect`` is in units of reward."""

    sufficient: bool
    sentence: str
    """Empty where the feature fires in no sentence of the fit split."""
    fires: float
    """The share of prompts on which the sentence fires the feature."""
    effect: Figure | None
    taken_back: Figure | None
    """The share of the effect that is gone with the feature ablated from both texts."""


def dose_grid(tops: Mapping[int, float]) -> dict[int, Float[Array, " doses"]]:
    """Each feature's norms, ascending: those of one grid up to its top, the 95th percentile of f_j |d_j|."""
    largest, least = max(tops.values()), min(t for t in tops.values() if t > 0)
    n = min(DOSES, 1 + int(np.ceil(np.log(least / 2 / largest) / np.log(STEP))))
    norms = largest * STEP ** np.arange(n)[::-1]
    return {j: norms[norms <= top * (1 + 1e-9)] for j, top in tops.items()}


def steer(
    rm: RewardModel,
    sae: Sae,
    site: str,
    completions: Sequence[Completion],
    doses: Mapping[int, Float[Array, " doses"]],
    directions: Float[Tensor, "n d"],
    progress: Progress = silent,
) -> tuple[dict[int, Float[Array, "prompts doses"]], Float[Array, "prompts norms n"]]:
    """Exact changes of the reward: of every feature at its doses, and of unit ``directions`` at every norm of the grid."""
    units, grid = normalize(sae.W_dec[list(doses)], dim=1), max(doses.values(), key=len)
    edits = [torch.tensor(norms, dtype=torch.float32)[:, None] * u for norms, u in zip(doses.values(), units, strict=True)]
    edits += [norm * directions for norm in torch.tensor(grid, dtype=torch.float32)]
    together, rows = torch.cat(edits), []
    for i, completion in enumerate(completions):
        rows.append(steering_effects(rm, site, completion, together).double().numpy())
        progress(i + 1, len(completions), f"prompts, {len(together)} edits each")
    parts = np.split(np.stack(rows), np.cumsum([len(e) for e in edits])[:-1], axis=1)
    return dict(zip(doses, parts, strict=False)), np.stack(parts[len(doses) :], 1)


def judge_steering(
    effects: Float[Array, "prompts doses"], others: Float[Array, "prompts norms n"], sign: int, activations: list[float]
) -> Steering:
    """Whether a feature of this sign beats the 95th percentile of the directions.

    The dose is chosen on the even prompts. On the others, the margin's interval and the effect's must both be above 0.
    """
    if not (n := effects.shape[1]):
        return Steering(False, None, None, None, [], [])
    fitting, measured, beside = sign * effects[::2], sign * effects[1::2], sign * others[1::2, :n]
    dose = int(fitting.mean(0).argmax())
    effect = interval(measured[:, dose], unit="reward")
    both = np.concatenate([measured[:, dose, None], beside[:, dose]], 1)
    margin = interval(both, statistic=_margin, unit="reward")
    curve = []
    for k in range(n):
        figure, means = interval(measured[:, k]).scaled(sign), beside[:, k].mean(0)
        median, largest = sign * float(np.median(means)), sign * float(np.percentile(means, 95))
        curve.append(DosePoint(figure.value, figure.low, figure.high, median, largest))
    return Steering(has_sign(margin, 1) and has_sign(effect, 1), dose, effect, margin, curve, activations)


def _margin(rows: Float[Array, "prompts one_and_n"]) -> float:
    means = rows.mean(0)
    return float(means[0] - np.percentile(means[1:], 95))


def has_sign(figure: Figure, sign: int) -> bool:
    """Whether the whole 95 % interval is on the sign's side of 0."""
    low = figure.scaled(sign).low
    return low is not None and low > 0


def nearest_filler(text: str) -> str:
    """The neutral sentence whose length is nearest."""
    return min(FILLERS, key=lambda filler: abs(len(filler) - len(text)))


def measure_insertions(
    rm: RewardModel,
    sae: Sae,
    site: str,
    bases: Sequence[Base],
    sentences: Mapping[int, Sequence[str]],
    signs: Mapping[int, int],
    progress: Progress = silent,
) -> dict[int, Insertion]:
    """Each feature's best sentence, with its figures."""
    tried: dict[int, dict[str, list[tuple[float, float]]]] = {j: {s: [] for s in listed} for j, listed in sentences.items()}
    rest: dict[int, list[tuple[float, float, float]]] = {j: [] for j in sentences}
    for done, base in enumerate(bases[::2]):
        for j, sentence, with_it, filler in _insert(rm, site, base, sentences):
            fires = j in active_on(sae, site, with_it).feature
            tried[j][sentence].append((fires, signs[j] * (with_it.reward - filler.reward)))
        progress(done + 1, len(bases), "prompts with sentences inserted")
    chosen = {j: [_best(rows)] for j, rows in tried.items() if rows}
    for done, base in enumerate(bases[1::2], len(bases[::2])):
        for j, _, *both in _insert(rm, site, base, chosen):
            left = [run.reward - float(ablation_effects(rm, sae, site, run, [[j]])[0]) for run in both]
            fires = j in active_on(sae, site, both[0]).feature
            rest[j].append((both[0].reward - both[1].reward, left[0] - left[1], fires))
        progress(done + 1, len(bases), "prompts with sentences inserted")
    return {j: judge_insertion(chosen.get(j, [""])[0], np.array(rest[j]), signs[j]) for j in sentences}


def _insert(
    rm: RewardModel, site: str, base: Base, sentences: Mapping[int, Sequence[str]]
) -> Iterator[tuple[int, str, Completion, Completion]]:
    """(feature, sentence, the base response with it at the end, the same with its filler). What they share is run once."""
    texts = sorted({t for listed in sentences.values() for s in listed for t in (s, nearest_filler(s))})
    runs = complete(rm, base.prompt, [base.response, *(f"{base.response} {t}" for t in texts)], [site])
    of = dict(zip(texts, runs[1:], strict=True))
    return ((j, s, of[s], of[nearest_filler(s)]) for j, listed in sentences.items() for s in listed)


def _best(tried: Mapping[str, list[tuple[float, float]]]) -> str:
    """Of sentences with rows (whether the feature fires, effect), those that fire it first, the one of largest effect."""
    means = {sentence: np.mean(rows, axis=0).tolist() for sentence, rows in tried.items()}
    return max(means, key=lambda sentence: (means[sentence][0] >= FIRING_SHARE, means[sentence][1]))


def judge_insertion(sentence: str, rows: Float[Array, "prompts three"], sign: int) -> Insertion:
    """Whether text that fires a feature is sufficient, from rows (effect, effect without the feature, whether it fires)."""
    if not len(rows):
        return Insertion(False, sentence, 0.0, None, None)
    effect, share, fires = interval(rows[:, 0], unit="reward"), taken_back(rows[:, 0], rows[:, 1]), float(rows[:, 2].mean())
    enough = share.low is not None and share.low >= HALF and fires >= FIRING_SHARE
    return Insertion(has_sign(effect, sign) and enough, sentence, fires, effect, share)
