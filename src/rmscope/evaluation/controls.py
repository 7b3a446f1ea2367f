"""Controls of every explanation: dictionaries without training, noise, matched features.

A control dictionary is an SAE like any other, so it goes through the same code. There are three: principal components and
residual coordinates as 2 d signed directions (f = relu of the coordinate and of its negative: all of them together are
exact); the same with only the k largest of a token; and a random dictionary of as many unit directions as the SAE, with
the k largest of a token and one scale fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.splice import Replacement, Span
from rmscope.evaluation.keep import Donors, Units, feature_sum
from rmscope.evaluation.selection import Profile
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae
from rmscope.sae.topk import TopKSae
from rmscope.statistics import Array

NEAREST = 8
"""A matched feature is drawn from this many nearest ones."""


def principal_components(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "d d"]:
    """Rows: unit directions, the largest variance first."""
    centred = x.double() - x.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.t() @ centred / len(x))
    return vectors.flip(1).t().float()


def signed_basis(basis: Float[Tensor, "d d"], centre: Float[Tensor, " d"], k: int | None = None) -> Sae:
    """An orthonormal basis as an SAE: with all coordinates (x^ = x), or with the k largest of a token."""
    rows, d = torch.cat([basis, -basis]), basis.shape[1]
    sae: Sae = StandardSae(d, 2 * d) if k is None else TopKSae(d, 2 * d, k=k)
    return sae.fill({"W_dec": rows, "W_enc": rows.t(), "b_dec": centre, "b_enc": torch.zeros(2 * d)})


def signed_units(d: int) -> Units:
    """The units of :func:`signed_basis`: both signs of a coordinate."""
    return np.stack([np.arange(d), np.arange(d) + d], 1)


def random_dictionary(x: Float[Tensor, "tokens d"], m: int, k: int, seed: int = 0) -> Sae:
    """``m`` random unit directions; the k with the largest products are active, with one scale fitted to ``x``."""
    d, centre = x.shape[1], x.mean(0)
    rows = torch.nn.functional.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(seed)), dim=1)
    weights = {"W_dec": rows, "W_enc": rows.t(), "b_dec": centre, "b_enc": torch.zeros(m)}
    sae = TopKSae(d, m, k=k).fill(weights)
    y, y_hat = x - centre, sae(x) - centre
    sae.W_dec.mul_(float((y * y_hat).sum() / y_hat.square().sum()))
    return sae


def noise(sae: Sae, seed: int = 0) -> Replacement:
    """One variant: x plus a random direction, as long as the error of each token."""

    def replace(at: Span) -> Tensor:
        generator = torch.Generator().manual_seed(2 * (seed + 1_000_003 * at.pair) + (at.side == "chosen"))
        direction = torch.randn(at.x.shape, generator=generator)
        size = (at.x - sae(at.x)).norm(dim=1, keepdim=True)
        return (at.x + size * torch.nn.functional.normalize(direction, dim=1))[None]

    return replace


def matched_controls(
    profile: Profile, features: Int[Array, " k"], forbidden: Int[Array, " n"], seed: int = 0
) -> Int[Array, " k"]:
    """For each feature another one with about the same firing rate on either side and the same Σ_t f_tj |d_j|."""
    traits = np.stack([profile.fire_chosen + 1e-6, profile.fire_rejected + 1e-6, profile.mass + 1e-9], 1)
    return match_by_traits(traits, profile.mass > 0, features, forbidden, seed)


def match_by_traits(
    traits: Float[Array, "m traits"],
    free: Array,
    features: Sequence[int] | Array,
    forbidden: Sequence[int] | Array,
    seed: int,
) -> Int[Array, " k"]:
    """For each of ``features`` one of the ``free`` features [m] that are nearest in the logarithms of their positive traits.

    No feature is used twice, and none of ``forbidden`` is used. The result is shorter where the free features run out.
    """
    rng = np.random.default_rng(seed)
    traits, free = np.log(traits), free.copy()
    free[np.asarray(forbidden, dtype=np.int64)] = False
    out = []
    for j in features:
        left = np.flatnonzero(free)
        if not left.size:
            break
        distance = np.abs(traits[left] - traits[j]).sum(1)
        pick = int(left[rng.choice(np.argsort(distance, kind="stable")[:NEAREST])])
        free[pick] = False
        out.append(pick)
    return np.array(out, dtype=np.int64)


def norm_matched_moves(sae: Sae, donors: Donors, sets: Sequence[Int[Array, " _"]]) -> Replacement:
    """One variant per set: x moved along the difference of two donors' streams, as far as ablating the set moves it."""

    def replace(at: Span) -> Tensor:
        a, b, *_ = donors.x(at.pair, len(at.x))
        direction = torch.nn.functional.normalize(a - b, dim=1)
        return torch.stack([at.x + feature_sum(sae, at.x, s).norm(dim=1, keepdim=True) * direction for s in sets])

    return replace
