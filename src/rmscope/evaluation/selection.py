"""One list of features, frozen on the select split, and its controls: dictionaries without training, matched features.

The order is forward selection on contributions. With D_j = A_j chosen - A_j rejected, by integrated gradients from the
dataset's mean (:mod:`rmscope.effects.ledger`), the next feature is the one that leaves the smallest Σ(Δr - Σ_K D_j)² over
the select pairs. One path gradient per pair serves every dictionary, so features, principal components and coordinates are
ordered by the same rule. Means, firing rates and flags come from the stored responses of the select pairs.

*Controls.* A control dictionary is an SAE too. There are three: principal components and residual coordinates as 2 d signed
directions (f = relu of the coordinate and of its negative: all of them together are exact); the same with only the k largest
of a token; and random unit directions, as many as the SAE has, with one scale fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.store import REGIONS, ActivationStore
from rmscope.effects.gradients import on_span
from rmscope.effects.ledger import Path
from rmscope.effects.splice import Replacement, Span
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.ranking.confirm import length_bound
from rmscope.ranking.feature_statistics import DENSE
from rmscope.ranking.flags import ENDING
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae
from rmscope.sae.topk import TopKSae
from rmscope.statistics import Array

NEAREST = 8
"""A matched feature is drawn from this many nearest ones."""


class Responses:
    """The stored responses at one site, each with its stream from the divergence to the read position."""

    def __init__(self, store: ActivationStore, site: str, pairs: Collection[int] | None = None) -> None:
        """``pairs``: places of the pairs in the store whose responses are read; all where left out."""
        self._store, self._site = store, site
        pair, region = (store.column(site, name).numpy().astype(np.int64) for name in ("pair", "region"))
        key = pair * len(REGIONS) + region
        edges = np.flatnonzero(np.r_[True, key[1:] != key[:-1], True])
        spans = [(int(a), int(b)) for a, b in pairwise(edges) if region[a] > 0]
        self._parts = parts = spans if pairs is None else [(a, b) for a, b in spans if int(pair[a]) in pairs]
        self.pair = np.array([pair[a] for a, _ in parts])
        self.side = [REGIONS[region[a]] for a, _ in parts]

    def __len__(self) -> int:
        return len(self._parts)

    def x(self, i: int) -> Float[Tensor, "span d"]:
        """The stream of response ``i``."""
        return self._store.rows(self._site, torch.arange(*self._parts[i]))

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "tokens d"]:
        """At most ``n`` of their tokens, drawn without replacement."""
        rows = torch.cat([torch.arange(a, b) for a, b in self._parts])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
        return self._store.rows(self._site, rows[order])


@dataclass(frozen=True)
class Profile:
    """What each feature of an SAE does on stored responses; arrays are [m]. The means of f and x are over all tokens."""

    fire_chosen: Array
    """Share of the tokens of chosen responses on which it fires."""
    fire_rejected: Array
    mass: Array
    """Σ_t f_tj |d_j| of a response, on average."""
    dense: Array
    """Flag: it fires on more than 10 % of the tokens."""
    ending: Array
    """Flag: at least .8 of its activation is on the endings of responses. The exact flag would need ablations."""
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]


def profile(sae: Sae, responses: Responses, ending: Callable[[int, str], int]) -> Profile:
    """The profile over some responses. ``ending`` (pair, side) gives the place in the span at which the ending begins."""
    fires, tokens = torch.zeros(2, sae.m).double(), torch.zeros(2, 1).double()
    total, last, x_total = torch.zeros(sae.m).double(), torch.zeros(sae.m).double(), torch.zeros(sae.d).double()
    for i, side in enumerate(responses.side):
        x, s = responses.x(i), SIDES.index(side)
        active = sae.active(x)
        value = active.value.double()
        fires[s] += torch.bincount(active.feature, minlength=sae.m)
        tokens[s] += len(x)
        total.index_add_(0, active.feature, value)
        at_end = active.token >= ending(int(responses.pair[i]), side)
        last.index_add_(0, active.feature, value * at_end)
        x_total += x.double().sum(0)
    n, rates = tokens.sum().clamp(min=1), (fires / tokens.clamp(min=1)).numpy()
    return Profile(
        rates[0],
        rates[1],
        (total * sae.W_dec.norm(dim=1) / max(1, len(responses))).numpy(),
        (fires.sum(0) / n > DENSE).numpy(),
        ((total > 0) & (last >= ENDING * total)).numpy(),
        (total / n).float(),
        (x_total / n).float(),
    )


def differences(
    rm: RewardModel,
    dictionaries: Mapping[str, tuple[Sae, Float[Tensor, " m"]]],
    site: str,
    tokens: Sequence[PairTokens],
    x_mean: Float[Tensor, " d"],
    cuts: Sequence[float] = (0.0, 1.0),
    progress: Progress = silent,
) -> tuple[dict[str, Float[Array, "pairs m"]], Float[Array, " pairs"]]:
    """(D of every feature of each dictionary, Δr). A dictionary is (SAE, mean features f0 [m]).

    By default the path has no cuts: it serves the choice alone, and what is chosen is measured by running the model.
    """
    D = {name: np.zeros((len(tokens), sae.m), dtype=np.float32) for name, (sae, _) in dictionaries.items()}
    delta, done = np.zeros(len(tokens)), 0
    for batch in rm.batches(tokens):
        path = Path(rm, site, batch, x_mean)
        gradient = torch.stack([path.panel(low, high).gradient for low, high in pairwise(cuts)]).sum(0)
        rewards = path.rewards(1.0).double().cpu().numpy()
        for i, text in enumerate(batch.texts):
            sign, x, g = (1 if text.side == "chosen" else -1), on_span(path.x, text), on_span(gradient, text)
            delta[text.pair] += sign * rewards[i]
            for name, (sae, f_mean) in dictionaries.items():
                A = ((sae.encode(x) - f_mean) * (g @ sae.W_dec.t())).sum(0)
                D[name][text.pair] += sign * A.numpy()
        done += len({t.pair for t in batch.texts})
        progress(done, len(tokens), "pairs attributed")
    return D, delta


def forward_order(D: Float[Array, "pairs units"], delta: Float[Array, " pairs"]) -> Int[Array, " units"]:
    """All units: first those that lower Σ(Δr - Σ_K D_j)² one after the other, then the rest by Σ D_j², smallest first."""
    own = (D.astype(float) ** 2).sum(0)
    rest, left, order = delta.astype(float).copy(), np.ones(D.shape[1], dtype=bool), []
    while left.any():
        gain = np.where(left, 2 * rest @ D - own, -np.inf)
        j = int(gain.argmax())
        if gain[j] <= 0:
            break
        rest -= D[:, j]
        left[j] = False
        order.append(j)
    others = np.flatnonzero(left)
    return np.array([*order, *others[np.argsort(own[others], kind="stable")]], dtype=np.int64)


def length_flags(D: Float[Array, "pairs m"], lengths: Float[Array, " pairs"]) -> Array:
    """The features whose mean D loses at least half in a regression on the length difference, as flags [m]."""
    return np.array([length_bound(d.astype(float), lengths.astype(float)) for d in D.T])


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


def signed_units(d: int) -> Int[Array, "d 2"]:
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


def matched_controls(profile: Profile, features: Int[Array, " k"], seed: int = 0) -> Int[Array, " k"]:
    """For each feature another one with about the same firing rate on either side and the same Σ_t f_tj |d_j|."""
    traits = np.stack([profile.fire_chosen + 1e-6, profile.fire_rejected + 1e-6, profile.mass + 1e-9], 1)
    return match_by_traits(traits, profile.mass > 0, features, features, seed)


def match_by_traits(
    traits: Float[Array, "m traits"], free: Array, features: Iterable[int], forbidden: Sequence[int] | Array, seed: int
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


def distinct_sets(groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """The groups that hold something, each set of features once: where free features are few, draws repeat."""
    return [list(group) for group in {frozenset(group): group for group in groups if group}.values()]
