"""The stream on the span replaced by another one, and how much of the reward difference survives.

A *replacement* gives the stream of a text at a site, from the divergence to the read position, and the model runs on from
there. *Splice* puts x^ = decode(encode(x)) there. ``rmscope.evaluation`` has other replacements. A pair's shared prefix runs
once, and the variants of a text share a batch.

From the clean Δr and the replaced Δr^ of a set of pairs:

    delta_r2          1 - Σ(Δr - Δr^)² / Σ Δr²        uncentred: the same whichever side is called chosen
    agreement         share of pairs with sign Δr^ = sign Δr
    reward_recovered  1 - Σ|r - r^| / Σ|r - r_mean|   over responses; r_mean with the stream's mean on the span

reward_recovered is "loss recovered" (SAELens; Gao et al. 2024, section 4.1) with the change of the reward instead of the
loss: 1 where the splice moves no reward, 0 where it does the damage of mean ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import clean_runs, rewards_on_span
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, one_minus


@dataclass(frozen=True, slots=True)
class Span:
    """One response at one site: the stream x on its span, float32 on the CPU."""

    pair: int
    side: str
    x: Float[Tensor, "span d"]


Replacement = Callable[[Span], Float[Tensor, "variants span d"]]
"""The new stream on the span, in one or more variants; their number is the same for all spans."""


@dataclass(frozen=True, slots=True)
class ReplacedRewards:
    """Rewards of both sides (chosen, rejected): clean, and with each variant of the replaced stream."""

    clean: Float[Array, "pairs 2"]
    rewards: Float[Array, "pairs 2 variants"]

    @property
    def delta(self) -> Float[Array, " pairs"]:
        """Δr."""
        return self.clean[:, 0] - self.clean[:, 1]

    @property
    def delta_hat(self) -> Float[Array, "pairs variants"]:
        """Δr^ of each variant."""
        return self.rewards[:, 0] - self.rewards[:, 1]


def run_replacements(
    rm: RewardModel,
    tokens: Sequence[PairTokens],
    pairs: Sequence[int],
    replacements: Mapping[str, tuple[str, Replacement]],
    progress: Progress = silent,
) -> dict[str, ReplacedRewards]:
    """Rewards of ``pairs`` (indices into ``tokens``, in their order) under each named (site, replacement)."""
    sites = sorted({site for site, _ in replacements.values()}, key=rm.site_index)
    clean = np.zeros((len(pairs), 2))
    rewards: dict[str, list[list[Array]]] = {name: [] for name in replacements}
    for done, pair in enumerate(pairs):
        texts, start = clean_runs(rm, tokens[pair], sites), tokens[pair].divergence
        clean[done] = [texts[side].reward for side in SIDES]
        for name, (site, replace) in replacements.items():
            rows = []
            for side in SIDES:
                streams = replace(Span(pair, side, texts[side].streams[site][start:].float().cpu()))
                rows.append(rewards_on_span(rm, texts[side], site, start, streams).double().numpy())
            rewards[name].append(rows)
        progress(done + 1, len(pairs), "pairs spliced")
    return {name: ReplacedRewards(clean, np.array(rows)) for name, rows in rewards.items()}


def splice(sae: Sae) -> Replacement:
    """The reconstruction x^."""
    return lambda at: sae.decode_active(sae.active(at.x))[None]


def constant(value: Float[Tensor, " d"]) -> Replacement:
    """The same vector at every token of the span: mean ablation, with the mean."""
    return lambda at: value.expand_as(at.x)[None]


def delta_r2(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """1 - Σ(Δr - Δr^)² / Σ Δr²."""
    return one_minus((delta - delta_hat) ** 2, delta**2, prompts)


def slope(delta: Array, delta_hat: Array) -> float:
    """The least-squares s of Δr = s Δr^. Fit it on other pairs than those on which it is used."""
    total = float(delta_hat @ delta_hat)
    return float(delta @ delta_hat) / total if total else 0.0


def cross_scaled(delta: Array, delta_hat: Array, prompts: Array) -> Array:
    """Δr^ times a slope fitted on the other half of the prompts."""
    half = np.unique(prompts, return_inverse=True)[1] % 2
    out = np.empty_like(delta_hat)
    for side in (0, 1):
        out[half == side] = delta_hat[half == side] * slope(delta[half != side], delta_hat[half != side])
    return out


def agreement(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """Share of pairs with sign Δr^ = sign Δr."""
    return one_minus((np.sign(delta) != np.sign(delta_hat)).astype(float), np.ones_like(delta), prompts)


def reward_recovered(clean: Array, spliced: Array, ablated: Array, prompts: Array) -> Figure:
    """1 - Σ|r - r^| / Σ|r - r_mean| over both sides, each [pairs, 2]."""
    return one_minus(np.abs(clean - spliced).sum(1), np.abs(clean - ablated).sum(1), prompts)
