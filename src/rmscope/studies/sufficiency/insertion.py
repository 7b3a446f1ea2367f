"""Sufficient by text: a sentence in which a feature fires, added at the end of fresh responses.

Its effect is the reward with the sentence minus the reward with a neutral sentence of similar length. The sentence is chosen
on every other prompt; its figures are those of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rmscope.effects.completions import Completion, ablation_effects, active_on, complete
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, interval
from rmscope.studies.experiment.conditions import Base
from rmscope.studies.experiment.verdict import taken_back
from rmscope.studies.sufficiency.firing import nearest_filler
from rmscope.studies.sufficiency.steering import has_sign

HALF = 0.5
"""The share of the effect that ablating the feature must take back."""
FIRING_SHARE = 0.5
"""The share of prompts on which the sentence must fire its feature."""


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
        runs = _insert(rm, base, [s for listed in sentences.values() for s in listed], site)
        for j, sentence in ((j, s) for j, listed in sentences.items() for s in listed):
            with_it, without = runs[sentence], runs[nearest_filler(sentence)]
            tried[j][sentence].append((with_it.reward - without.reward, _fires(sae, site, with_it, j)))
        progress(done + 1, len(bases), "prompts with sentences inserted")
    chosen = {j: _best(rows, signs[j]) for j, rows in tried.items() if rows}
    for done, base in enumerate(bases[1::2], len(bases[::2])):
        runs = _insert(rm, base, list(chosen.values()), site)
        for j, sentence in chosen.items():
            both = runs[sentence], runs[nearest_filler(sentence)]
            left = [run.reward - float(ablation_effects(rm, sae, site, run, [[j]])[0]) for run in both]
            rest[j].append((both[0].reward - both[1].reward, left[0] - left[1], _fires(sae, site, both[0], j)))
        progress(done + 1, len(bases), "prompts with sentences inserted")
    return {j: judge_insertion(chosen.get(j, ""), np.array(rest[j]), signs[j]) for j in sentences}


def _fires(sae: Sae, site: str, run: Completion, feature: int) -> float:
    return float((active_on(sae, site, run).feature == feature).any())


def _best(tried: Mapping[str, Sequence[tuple[float, float]]], sign: int) -> str:
    """Of sentences with rows (effect, whether the feature fires), the one that moves the reward most in its sign.

    Sentences that fire the feature come first.
    """

    def worth(sentence: str) -> tuple[bool, float]:
        effect, fires = np.array(tried[sentence]).mean(0)
        return bool(fires >= FIRING_SHARE), sign * float(effect)

    return max(tried, key=worth)


def _insert(rm: RewardModel, base: Base, sentences: Sequence[str], site: str) -> dict[str, Completion]:
    """The base response with each sentence, and with its filler, at the end. What they share is run once."""
    texts = sorted({t for s in sentences for t in (s, nearest_filler(s))})
    responses = [base.response, *(f"{base.response} {t}" for t in texts)]
    return dict(zip(texts, complete(rm, base.prompt, responses, [site])[1:], strict=True))


def judge_insertion(sentence: str, rows: Float[Array, "prompts three"], sign: int) -> Insertion:
    """Whether text that fires a feature is sufficient, from rows (effect, effect without the feature, whether it fires)."""
    if not len(rows):
        return Insertion(False, sentence, 0.0, None, None)
    effect, share, fires = interval(rows[:, 0], unit="reward"), taken_back(rows[:, 0], rows[:, 1]), float(rows[:, 2].mean())
    enough = share.low is not None and share.low >= HALF and fires >= FIRING_SHARE
    return Insertion(has_sign(effect, sign) and enough, sentence, fires, effect, share)
