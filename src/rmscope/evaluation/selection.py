"""One global list of features, frozen on the select split: which of them explain the reward difference, in which order.

The order is forward selection on contributions. With D_j = A_j chosen - A_j rejected, by integrated gradients from the
dataset's mean (:mod:`rmscope.effects.ledger`), the next feature is the one that leaves the smallest Σ(Δr - Σ_K D_j)² over
the select pairs. One path gradient per pair serves every dictionary, so features, principal components and coordinates are
ordered by the same rule. Means, firing rates and flags come from the stored responses of the select pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.store import REGIONS, ActivationStore
from rmscope.effects.ledger import Path
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.ranking.confirm import length_bound
from rmscope.ranking.feature_statistics import DENSE
from rmscope.ranking.flags import ENDING
from rmscope.sae.base import Sae
from rmscope.statistics import Array

CUTS = (0.0, 1.0)
"""The path is not cut further: it serves the choice alone, and what is chosen is measured by running the model."""


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
    """What each feature of an SAE does on stored responses; arrays are [m]."""

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
    """Mean activation over the tokens."""
    x_mean: Float[Tensor, " d"]
    """Mean stream over the tokens."""


def profile(sae: Sae, responses: Responses, ending: Callable[[int, str], int]) -> Profile:
    """The profile over some responses. ``ending`` (pair, side) gives the place in the span at which the ending begins."""
    fires: dict[str, Tensor] = {side: torch.zeros(sae.m).double() for side in SIDES}
    tokens: dict[str, int] = dict.fromkeys(SIDES, 0)
    total, last, x_total = torch.zeros(sae.m).double(), torch.zeros(sae.m).double(), torch.zeros(sae.d).double()
    for i in range(len(responses)):
        x, side = responses.x(i), responses.side[i]
        active = sae.active(x)
        value = active.value.double()
        fires[side] += torch.bincount(active.feature, minlength=sae.m)
        tokens[side] += len(x)
        total.index_add_(0, active.feature, value)
        at_end = active.token >= ending(int(responses.pair[i]), side)
        last.index_add_(0, active.feature, value * at_end)
        x_total += x.double().sum(0)
    n = max(1, sum(tokens.values()))
    rate = {side: (fires[side] / max(1, tokens[side])).numpy() for side in SIDES}
    return Profile(
        rate["chosen"],
        rate["rejected"],
        (total * sae.W_dec.norm(dim=1) / max(1, len(responses))).numpy(),
        (sum(fires.values()) / n > DENSE).numpy(),  # type: ignore[union-attr]
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
    cuts: Sequence[float] = CUTS,
    progress: Progress = silent,
) -> tuple[dict[str, Float[Array, "pairs m"]], Float[Array, " pairs"]]:
    """(D of every feature of each dictionary, Δr). A dictionary is (SAE, mean features f0 [m])."""
    D = {name: np.zeros((len(tokens), sae.m), dtype=np.float32) for name, (sae, _) in dictionaries.items()}
    delta, done = np.zeros(len(tokens)), 0
    for batch in rm.batches(tokens):
        path = Path(rm, site, batch, x_mean)
        clean = path.x
        gradient = torch.stack([path.panel(low, high).gradient for low, high in pairwise(cuts)]).sum(0)
        rewards = path.rewards(1.0).double().cpu().numpy()
        for i, text in enumerate(batch.texts):
            sign, at = (1 if text.side == "chosen" else -1), text.span.to(clean.device)
            x, g = clean[text.row, at].float().cpu(), gradient[text.row, at].float().cpu()
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
