"""Resampled ablation: a set of features is set to what it is in other responses, instead of to 0.

Zero is a value that a feature rarely has where it fires, so an ablation to zero may leave what the later blocks know. Here
each token at which a feature of the set fires takes the values of the whole set, at all of its sites, from one token of
another response: one at the same place of its response (*place*), or one with the same token id (*token*). Where there is
none, any token of a response gives them. Tokens at which nothing of the set fires stay as they are.

The effect by *place* is like that of the ablation to zero where the effect does not come from the value zero. For rare
features that holds by construction: other responses mostly have zero there. The effect by *token* is the part that the
token's identity does not give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.effects.ablation import Entries, Response, entries_of
from rmscope.effects.across import Members
from rmscope.sae.base import Sae
from rmscope.sae.stored import active_entries
from rmscope.statistics import Array

Donor = Literal["place", "token"]
DONORS: tuple[Donor, ...] = ("place", "token")


class Donors:
    """The tokens of stored responses, with the values of some features there.

    Args:
        store: streams of responses at every site, row by row the same tokens.
        members: by site the features whose values may be taken.
    """

    def __init__(self, store: ActivationStore, saes: Mapping[str, Sae], members: Members) -> None:
        site = next(iter(members))
        rows, place = store.response_rows(site)
        self._keys = {"place": _Key(place), "token": _Key(store.column(site, "token").numpy()[rows])}
        self._values = {s: _values(store, saes[s], s, rows, features) for s, features in members.items()}

    def draw(self, donor: Donor, keys: Sequence[int], rng: np.random.Generator) -> Int[Array, " tokens"]:
        """A stored token for each place, or each token id."""
        return self._keys[donor].draw(keys, rng)

    def entries(self, site: str, features: Sequence[int], rows: Int[Array, " tokens"]) -> tuple[Tensor, Tensor, Tensor]:
        """(place in ``rows``, feature, value) of some features at a site, at stored tokens."""
        values = self._values[site][rows].tocoo()
        own = np.isin(values.col, features)
        place, feature, value = values.row[own], values.col[own], values.data[own]
        return torch.from_numpy(place).long(), torch.from_numpy(feature).long(), torch.from_numpy(value).float()


class _Key:
    """Stored tokens by a key of each."""

    def __init__(self, keys: Int[Array, " rows"]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def draw(self, keys: Sequence[int], rng: np.random.Generator) -> Int[Array, " tokens"]:
        low, high = (np.searchsorted(self._sorted, keys, side=side) for side in ("left", "right"))
        none = low == high
        low, high = np.where(none, 0, low), np.where(none, self._order.size, high)
        return self._order[(low + rng.random(low.size) * (high - low)).astype(int)]


def _values(
    store: ActivationStore, sae: Sae, site: str, rows: Int[Array, " rows"], features: Sequence[int]
) -> sparse.csr_matrix:
    """The activations of some features at stored rows, [rows, m]."""
    wanted = np.zeros(sae.m, dtype=bool)
    wanted[list(features)] = True
    parts = []
    for row, feature, value in active_entries(store, sae, site, rows):
        own = wanted[feature]
        parts.append((row[own], feature[own], value[own]))
    row, feature, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    return sparse.csr_matrix((value, (row, feature)), shape=(rows.size, sae.m))


def resampled_entries(
    donors: Donors, donor: Donor, responses: Mapping[str, Response], members: Members, rng: np.random.Generator
) -> dict[str, Entries]:
    """By site the entries whose ablation sets a set of features to a donor's values: its own, less those of the donor.

    ``responses`` holds one response at every site of the set.
    """
    own = {site: entries_of(responses[site].active, features) for site, features in members.items()}
    fires = torch.unique(torch.cat([token for token, _, _ in own.values()]))
    if not fires.numel():
        return own
    some = next(iter(responses.values()))
    keys = fires if donor == "place" else some.text.ids.cpu()[some.start + fires]
    rows = donors.draw(donor, keys.tolist(), rng)
    entries = {}
    for site, (token, feature, value) in own.items():
        at_site = torch.isin(fires, token)
        place, features, values = donors.entries(site, members[site], rows[at_site.numpy()])
        tokens = torch.cat([token, fires[at_site][place]])
        order = tokens.argsort(stable=True)
        entries[site] = (
            tokens[order],
            torch.cat([feature, features])[order],
            torch.cat([value, -values.to(value)])[order],
        )
    return entries
