"""One global list of features, frozen on the select split: which explain the reward difference, and what each is like.

The list orders features by how much of Δr their contributions take away, one after the other (forward selection): with
D_j = A_j chosen - A_j rejected, integrated gradients from the dataset's mean (``ledger.py``), the next feature is the one
that leaves the smallest Σ(Δr - Σ_K D_j)² over the select pairs. One path gradient a pair serves every dictionary, so
features, principal components and coordinates are ordered by the same rule. Means, firing rates and flags come from the
store of the select pairs.
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
from rmscope.ranking.feature_statistics import DENSE
from rmscope.ranking.flags import ENDING
from rmscope.ranking.ranking import length_bound
from rmscope.sae.base import Sae
from rmscope.statistics import Array

CUTS = (0.0, 1.0)
"""Of the path, for choosing; what is chosen is then measured by running the model."""


class Responses:
    """The responses in a store at one site (of some of its pairs), each with its stream from divergence to read position."""

    def __init__(self, store: ActivationStore, site: str, pairs: Collection[int] | None = None) -> None:
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
        return self._store.rows(self._site, torch.arange(*self._parts[i]))

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "tokens d"]:
        """At most ``n`` of their tokens, drawn once."""
        rows = torch.cat([torch.arange(a, b) for a, b in self._parts])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
        return self._store.rows(self._site, rows[order])


@dataclass(frozen=True)
class Profile:
    """Per feature of an SAE over stored responses [m]: token firing rates a side, Σ_t f_tj |d_j| a response, flags; and the
    means f [m], x [d] over their tokens."""

    fire_chosen: Array
    fire_rejected: Array
    mass: Array
    dense: Array
    ending: Array
    """At least .8 of its activation lies on the responses' endings: the screen's stand-in for the exact flag."""
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]


def profile(sae: Sae, responses: Responses, ending: Callable[[int, str], int]) -> Profile:
    """One reading of the responses. ``ending`` (pair, side) gives the place in the span where the ending begins."""
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
    """(D of every feature of each dictionary, Δr). A dictionary comes with its mean features f0 [m]."""
    found = {name: np.zeros((len(tokens), sae.m), dtype=np.float32) for name, (sae, _) in dictionaries.items()}
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
                found[name][text.pair] += sign * A.numpy()
        done += len({t.pair for t in batch.texts})
        progress(done, len(tokens), "pairs attributed")
    return found, delta


def forward_order(D: Float[Array, "pairs units"], delta: Float[Array, " pairs"]) -> Int[Array, " units"]:
    """All units: those that lower Σ(Δr - Σ_K D_j)² one after the other, then the rest by Σ D_j², smallest first."""
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
    """Features whose mean D loses half once it is regressed on the length difference."""
    return np.array([length_bound(d.astype(float), lengths.astype(float)) for d in D.T])
