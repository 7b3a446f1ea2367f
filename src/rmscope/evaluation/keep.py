"""How much of the reward difference a list of features explains: keep K, ablate K, the error alone.

*Keep K* (METHOD, "Explained"): the list's first K features stay as they are on the span; all other features and the SAE's
error come from somewhere else,

    x'_t = x0_t + Σ_{j in K} (f_tj - f0_tj) d_j

where x0 = x^0 + e0 is, token by token, another response's stream (its *donor*, from the store; a prompt of its own; the
same for both sides of a pair; its tokens stretched so that first lies on first and last on last), or the dataset's mean.
With donors Δr^ is the mean over donors, since what is asked is what the kept features say by themselves, not what one donor
adds. Keeping all gives x^ plus the donor's error; keeping none gives the donor. The *error alone* is its mirror:
features of the donor, error kept. *Ablate K* sets the list's first K features to 0, the error stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.splice import Figure, Replaced, Replacement, Span, agreement, delta_r2, one_minus
from rmscope.errors import InputError
from rmscope.evaluation.selection import Responses
from rmscope.sae.base import Sae
from rmscope.statistics import Array

DONORS = 5
GRID = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ABLATED = (1, 4, 16, 64, 256)
THRESHOLDS = (0.5, 0.8, 0.9)

Units = Int[Array, "units width"]
"""A list of features in order; a principal component is a unit of two, one a sign."""


class Donors:
    """Stored responses that stand in for others: ``of(pair)`` draws them for a pair, none with the pair's prompt."""

    def __init__(
        self, responses: Responses, stored_prompts: Sequence[str], prompts: Sequence[str], n: int = DONORS, seed: int = 0
    ) -> None:
        """``stored_prompts`` names the prompt of each stored pair, ``prompts`` that of each measured one."""
        self._responses, self._n, self._seed = responses, n, seed
        self._stored = np.array([stored_prompts[p] for p in responses.pair])
        self._prompts = prompts

    def of(self, pair: int) -> Int[Array, " donors"]:
        """The same for both sides, and whenever it is asked again; one a prompt. InputError where prompts are too few."""
        order = np.random.default_rng([self._seed, pair]).permutation(len(self._stored))
        order = order[self._stored[order] != self._prompts[pair]]
        _, first = np.unique(self._stored[order], return_index=True)
        if len(first) < self._n:
            raise InputError(
                f"The store holds responses to {len(first)} other prompts, donors need {self._n}; harvest more pairs."
            )
        return order[np.sort(first)][: self._n]

    def x(self, pair: int, length: int) -> list[Float[Tensor, "span d"]]:
        """The donors' streams, stretched to a span of that many tokens."""
        return [stretched(self._responses.x(int(i)), length) for i in self.of(pair)]


def stretched(x: Float[Tensor, "tokens d"], length: int) -> Float[Tensor, "length d"]:
    """The rows at evenly spaced places, first on first and last on last (the last where there is room for one)."""
    if length <= 1:
        return x[len(x) - length :]
    return x[torch.linspace(0, len(x) - 1, length).round().long()]


@dataclass(frozen=True)
class AblationBaseline:
    """Where what is not kept comes from: donors first, then the mean f [m], x [d]."""

    sae: Sae
    donors: Donors
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]

    def bases(self, at: Span) -> list[tuple[Float[Tensor, "span d"], Float[Tensor, "span m"]]]:
        """(x0, f0) of each donor, then of the mean."""
        n = len(at.x)
        found = [(x0, self.sae.encode(x0)) for x0 in self.donors.x(at.pair, n)]
        return [*found, (self.x_mean.expand(n, -1), self.f_mean.expand(n, -1))]


def keep(ground: AblationBaseline, order: Units, grid: Sequence[int]) -> Replacement:
    """Variants base by base (the donors, then the mean), within a base over the grid (ascending)."""

    def replace(at: Span) -> Tensor:
        sae, out = ground.sae, []
        f = sae.encode(at.x)
        for x0, f0 in ground.bases(at):
            kept, done = x0.clone(), 0
            for k in grid:
                units = torch.from_numpy(order[done:k].reshape(-1))
                if units.numel():
                    kept = kept + (f - f0)[:, units] @ sae.W_dec[units]
                out.append(kept)
                done = k
        return torch.stack(out)

    return replace


def error_alone(ground: AblationBaseline) -> Replacement:
    """Variants over the bases: features of the donor (or mean), the error as it is."""

    def replace(at: Span) -> Tensor:
        e = at.x - ground.sae(at.x)
        return torch.stack([ground.sae.decode(f0) + e for _, f0 in ground.bases(at)])

    return replace


def ablated(sae: Sae, x: Float[Tensor, "span d"], features: Int[Array, " k"]) -> Float[Tensor, "span d"]:
    """Σ_j f_tj d_j of the features: what their ablation takes out of the stream."""
    j = torch.from_numpy(np.asarray(features).reshape(-1))
    return sae.encode(x)[:, j] @ sae.W_dec[j]


def ablate(sae: Sae, lists: Sequence[Sequence[Int[Array, " _"]]]) -> Replacement:
    """Variants list by list, and within a list set by set: the stream without the set's features."""
    return lambda at: torch.stack([at.x - ablated(sae, at.x, set_) for sets in lists for set_ in sets])


# Curves


@dataclass(frozen=True, slots=True)
class KeepPoint:
    """Keep K at one K: delta_r2 with donors (mean Δr^ over them), from the mean, with one donor at a time; agreement."""

    k: int
    donors: Figure
    mean: Figure
    single: float
    agreement: Figure

    def as_dict(self) -> dict[str, object]:
        figures = {n: getattr(self, n).as_dict() for n in ("donors", "mean", "agreement")}
        return {"k": self.k, **figures, "single": self.single}


def keep_curve(found: Replaced, grid: Sequence[int], prompts: Array) -> list[KeepPoint]:
    """The curve of what :func:`keep` measured."""
    hat = found.delta_hat.reshape(len(found.delta), -1, len(grid))
    points = []
    for i, k in enumerate(grid):
        donors = hat[:, :-1, i]
        single = 1 - ((found.delta[:, None] - donors) ** 2).mean(1).sum() / (found.delta**2).sum()
        mean = delta_r2(found.delta, hat[:, -1, i], prompts)
        averaged = donors.mean(1)
        agree = agreement(found.delta, averaged, prompts)
        points.append(KeepPoint(k, delta_r2(found.delta, averaged, prompts), mean, float(single), agree))
    return points


def smallest(points: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The smallest K of the grid whose delta_r2 reaches the threshold; None where none does."""
    return next((k for k, value in points if value >= threshold), None)


def lost(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """The share of Δr that goes: 1 - Σ Δr Δr^ / Σ Δr²; 0 where nothing changes, 1 where nothing of it is left."""
    return one_minus(delta * delta_hat, delta**2, prompts)
