"""How much of the reward difference a list of features explains: keep K, ablate K, the error alone.

*Keep K*: the list's first K features stay as they are on the span. All other features and the SAE's error come from
somewhere else,

    x'_t = x0_t + Σ_{j in K} (f_tj - f0_tj) d_j

where x0 = x^0 + e0 is, token by token, the stream of another response, its *donor*, or the dataset's mean. A donor comes
from the store, answers another prompt, and is the same for both sides of a pair; its tokens are stretched over the span.
With donors Δr^ is the mean over donors: the question is what the kept features explain by themselves, not what one donor
adds. Keeping all features gives x^ plus the donor's error; keeping none gives the donor. The *error alone* is the mirror:
features of the donor, the error as it is. *Ablate K* sets the list's first K features to 0; the error stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.splice import Replaced, Replacement, Span, agreement, delta_r2
from rmscope.errors import InputError
from rmscope.evaluation.selection import Responses
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, one_minus

DONORS = 5
GRID = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ABLATE_GRID = (1, 4, 16, 64, 256)
THRESHOLDS = (0.5, 0.8, 0.9)

Units = Int[Array, "units width"]
"""A list of features in order. A principal component is a unit of two features, one per sign."""


class Donors:
    """Stored responses that replace others: ``of(pair)`` draws them for a pair, none of them with the pair's prompt."""

    def __init__(
        self, responses: Responses, stored_prompts: Sequence[str], prompts: Sequence[str], n: int = DONORS, seed: int = 0
    ) -> None:
        """``stored_prompts`` names the prompt of each stored pair, ``prompts`` that of each measured one."""
        self._responses, self._n, self._seed = responses, n, seed
        self._stored = np.array([stored_prompts[p] for p in responses.pair])
        self._prompts = prompts

    def of(self, pair: int) -> Int[Array, " donors"]:
        """The donors of a pair, one per prompt: the same for both sides and at every call.

        Raises:
            InputError: the store holds responses to too few other prompts.
        """
        order = np.random.default_rng([self._seed, pair]).permutation(len(self._stored))
        order = order[self._stored[order] != self._prompts[pair]]
        _, first = np.unique(self._stored[order], return_index=True)
        if len(first) < self._n:
            raise InputError(
                f"The store holds responses to {len(first)} other prompts, donors need {self._n}; harvest more pairs."
            )
        return order[np.sort(first)][: self._n]

    def x(self, pair: int, length: int) -> list[Float[Tensor, "span d"]]:
        """The donors' streams, stretched over a span of that many tokens."""
        return [stretch(self._responses.x(int(i)), length) for i in self.of(pair)]


def stretch(x: Float[Tensor, "tokens d"], length: int) -> Float[Tensor, "length d"]:
    """The rows at evenly spaced places, from the first to the last; the last one alone where there is room for one."""
    if length <= 1:
        return x[len(x) - length :]
    return x[torch.linspace(0, len(x) - 1, length).round().long()]


@dataclass(frozen=True)
class AblationBaseline:
    """What replaces the features that are not kept, and the error: donors, and beside them the means f [m], x [d]."""

    sae: Sae
    donors: Donors
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]

    def bases(self, at: Span) -> list[tuple[Float[Tensor, "span d"], Float[Tensor, "span m"]]]:
        """(x0, f0) of each donor, then of the mean."""
        n = len(at.x)
        of_donors = [(x0, self.sae.encode(x0)) for x0 in self.donors.x(at.pair, n)]
        return [*of_donors, (self.x_mean.expand(n, -1), self.f_mean.expand(n, -1))]


def keep(baseline: AblationBaseline, order: Units, grid: Sequence[int]) -> Replacement:
    """One variant per base (the donors, then the mean) and K of the grid (ascending); the K of a base are adjacent."""

    def replace(at: Span) -> Tensor:
        sae, out = baseline.sae, []
        f = sae.encode(at.x)
        for x0, f0 in baseline.bases(at):
            x, done = x0.clone(), 0
            for k in grid:
                features = torch.from_numpy(order[done:k].reshape(-1))
                if features.numel():
                    x = x + (f - f0)[:, features] @ sae.W_dec[features]
                out.append(x)
                done = k
        return torch.stack(out)

    return replace


def error_alone(baseline: AblationBaseline) -> Replacement:
    """One variant per base: the features of the donor (or their mean), the error as it is."""

    def replace(at: Span) -> Tensor:
        e = at.x - baseline.sae(at.x)
        return torch.stack([baseline.sae.decode(f0) + e for _, f0 in baseline.bases(at)])

    return replace


def feature_sum(sae: Sae, x: Float[Tensor, "span d"], features: Int[Array, " k"]) -> Float[Tensor, "span d"]:
    """Σ_j f_tj d_j over the features: what their ablation takes out of the stream."""
    j = torch.from_numpy(np.asarray(features).reshape(-1))
    return sae.encode(x)[:, j] @ sae.W_dec[j]


def ablate(sae: Sae, lists: Sequence[Sequence[Int[Array, " _"]]]) -> Replacement:
    """One variant per list and set of features, the sets of a list adjacent: the stream without the set's features."""
    return lambda at: torch.stack([at.x - feature_sum(sae, at.x, set_) for sets in lists for set_ in sets])


# Curves


@dataclass(frozen=True, slots=True)
class KeepPoint:
    """Keep K at one K."""

    k: int
    donors: Figure
    """delta_r2 with donors, of the mean Δr^ over them."""
    mean: Figure
    """delta_r2 with the dataset's mean in the place of donors."""
    single: float
    """delta_r2 with one donor at a time."""
    agreement: Figure
    """Share of pairs whose mean Δr^ has the sign of Δr."""

    def as_dict(self) -> dict[str, object]:
        figures = {n: getattr(self, n).as_dict() for n in ("donors", "mean", "agreement")}
        return {"k": self.k, **figures, "single": self.single}


def keep_curve(rows: Replaced, grid: Sequence[int], prompts: Array) -> list[KeepPoint]:
    """The curve of what :func:`keep` replaced, one point per K of the grid."""
    hat = rows.delta_hat.reshape(len(rows.delta), -1, len(grid))
    points = []
    for i, k in enumerate(grid):
        donors = hat[:, :-1, i]
        averaged = donors.mean(1)
        points.append(
            KeepPoint(
                k,
                donors=delta_r2(rows.delta, averaged, prompts),
                mean=delta_r2(rows.delta, hat[:, -1, i], prompts),
                single=float(1 - ((rows.delta[:, None] - donors) ** 2).mean(1).sum() / (rows.delta**2).sum()),
                agreement=agreement(rows.delta, averaged, prompts),
            )
        )
    return points


def smallest_k(points: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The smallest K of the grid whose delta_r2 reaches the threshold; None where none does."""
    return next((k for k, value in points if value >= threshold), None)


def lost_share(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """The share of Δr that is lost: 1 - Σ Δr Δr^ / Σ Δr²; 0 where nothing changes, 1 where nothing is left."""
    return one_minus(delta * delta_hat, delta**2, prompts)
