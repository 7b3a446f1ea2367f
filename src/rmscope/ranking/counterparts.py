"""The counterpart of a concept in SAEs of another seed: what fires there as its features do.

The effect of a feature is a property of its dictionary: another seed splits the same content otherwise. So a concept is
looked for in the SAEs of other seeds, and its effect is measured there too. Its counterpart at a site is every feature whose
activation correlates with that of a feature of the concept, or at its home site with that of the concept. Correlations are
over windows of the stored responses, and count from :data:`~rmscope.ranking.concepts.TOGETHER` on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float

from rmscope.activations.store import ActivationStore
from rmscope.effects.across import Members
from rmscope.ranking.concepts import TOGETHER, correlations_between, members_of, window_sums
from rmscope.sae.base import Sae
from rmscope.statistics import Array


def counterparts(
    store: ActivationStore, saes: Mapping[str, Sae], others: Sequence[Mapping[str, Sae]], concepts: pl.DataFrame
) -> list[dict[int, Members]]:
    """For the SAEs of each other seed the counterpart of each concept, by site; sites without one are left out.

    ``concepts`` has the columns concept, site, features, weights and elsewhere.
    """
    members = members_of(concepts)
    weights = dict(concepts.select("concept", "weights").iter_rows())
    found: list[dict[int, Members]] = [{concept: {} for concept in members} for _ in others]
    for site in dict.fromkeys(site for of in members.values() for site in of):
        own = window_sums(store, saes[site], site, range(saes[site].m))
        active = {}
        for concept, of in members.items():
            if site in of:
                columns = own[:, list(of[site])]
                home = next(iter(of)) == site
                active[concept] = np.c_[columns, columns @ weights[concept]] if home else columns
        for i, other in enumerate(others):
            again = window_sums(store, other[site], site, range(other[site].m))
            for concept, columns in active.items():
                if alike := firing_alike(columns, again):
                    found[i][concept] = {**found[i][concept], site: alike}
    return found


def firing_alike(active: Float[Array, "windows n"], others: Float[Array, "windows m"]) -> tuple[int, ...]:
    """The columns of ``others`` whose activation correlates with that of a column of ``active``."""
    return tuple(np.flatnonzero(correlations_between(active, others).max(0) >= TOGETHER).tolist())
