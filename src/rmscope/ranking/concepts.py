"""Concepts: sets of features that fire together and move the reward in one direction (docs/method.md, Concept).

Features are the wrong unit for a reader: one event, such as the end of a sentence, is split over features and sites. So
frozen features are grouped on the fit split, before anything is tested:

1. *At a site.* Features of one sign whose activations correlate over windows of text, or whose decoder rows point in one
   direction, are one concept (average linkage, cut at .7). What fires only where a concept of larger effect fires joins it:
   at a site with both parts of the stream, what the base says about the tokens at which training wrote.
2. *Weights.* A concept's activation is Σ_j w_j f_j, with w_j the estimated effect per unit of activation. It is in units of
   reward, and frozen.
3. *Across sites.* Concepts of one sign whose activations correlate are one: its activation is that of the site where its
   effect is largest, and it is ablated at all of its sites at once.

The same test as for features then runs on their joint ablations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from rmscope.activations.store import ActivationStore
from rmscope.ranking.candidates import ELIGIBLE_PROMPTS
from rmscope.sae.base import Sae
from rmscope.sae.stored import active_entries
from rmscope.statistics import Array

TOGETHER = 0.7
"""The correlation of activations, or the cosine of decoder rows, from which features or concepts count as one."""
WINDOW = 8
"""Tokens of a window. A later site may fire some tokens after an earlier one."""
INSIDE = 0.7
"""The share of a feature's activation in a concept's windows from which it joins the concept."""
CORE = 0.9
"""A concept's windows are the fewest that hold this share of its activation."""
LIFT = 3.0
"""The share of a feature in a concept's windows must be so many times what it would be by chance."""
MOST = 30
"""Concepts of a run that are frozen: those of the largest effects."""


@dataclass(frozen=True, slots=True)
class Concept:
    """A frozen set of features of one site."""

    site: str
    features: tuple[int, ...]
    weights: tuple[float, ...]
    """Reward per unit of activation, by feature, as estimated on the fit split; not negative."""
    sign: int
    fit_effect: float
    """The sum of its features' mean ablation effects on the fit split."""
    elsewhere: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """The same concept at other sites: (site, its features there)."""


WithActivation = tuple[Concept, Array]
"""A concept and its activation in each window."""


def build_concepts(
    store: ActivationStore, saes: Mapping[str, Sae], frozen: Mapping[str, pl.DataFrame], most: int = MOST
) -> list[Concept]:
    """The concepts of a run, the largest |effect| on the fit split first.

    Args:
        store: the stream of the fit split.
        frozen: per site, columns feature, sign, fit_effect, rate (estimated reward per unit of activation), fit_prompts.
        most: at most so many concepts.
    """
    at_sites: list[WithActivation] = []
    for site, table in frozen.items():
        listed = table.filter((pl.col("fit_prompts") >= ELIGIBLE_PROMPTS) & (pl.col("sign") != 0))
        for one in listed.partition_by("sign"):
            features = one["feature"].to_list()
            active = window_sums(store, saes[site], site, features)
            rows = saes[site].W_dec[features].numpy()
            alike = np.maximum(correlations(active), _cosines(rows))
            weights = np.abs(one["rate"].to_numpy())
            together = []
            for members in clusters(alike):
                part = one[members]
                concept = Concept(
                    site,
                    tuple(part["feature"].to_list()),
                    tuple(weights[members].tolist()),
                    int(part["sign"][0]),
                    float(part["fit_effect"].sum()),
                )
                together.append((concept, active[:, members] @ weights[members]))
            at_sites += join_contained(together)
    return _merge_sites(at_sites)[:most]


def join_contained(concepts: Sequence[WithActivation]) -> list[WithActivation]:
    """Concepts of one site and sign, after each has joined the largest one in whose windows it fires.

    It joins where at least :data:`INSIDE` of its activation is in the other's windows, and :data:`LIFT` times as much as
    such a share of all windows would hold by chance.
    """
    kept: list[WithActivation] = []
    cores: list[Bool[Array, " windows"]] = []
    for concept, active in sorted(concepts, key=lambda c: -abs(c[0].fit_effect)):
        total = active.sum() or 1.0
        inside = [(float(active[core].sum() / total), float(core.mean())) for core in cores]
        home = next((i for i, (share, chance) in enumerate(inside) if share >= max(INSIDE, LIFT * chance)), None)
        if home is None:
            kept.append((concept, active))
            cores.append(_core(active))
            continue
        larger, own = kept[home]
        joined = replace(
            larger,
            features=larger.features + concept.features,
            weights=larger.weights + concept.weights,
            fit_effect=larger.fit_effect + concept.fit_effect,
        )
        kept[home] = (joined, own + active)  # its windows stay those of what it began with
    return kept


def _core(active: Float[Array, " windows"]) -> Bool[Array, " windows"]:
    """The fewest windows that hold :data:`CORE` of an activation."""
    order = np.argsort(-active, kind="stable")
    held = np.cumsum(active[order])
    core = np.zeros(active.size, dtype=bool)
    if held.size and held[-1] > 0:
        core[order[: int(np.searchsorted(held, CORE * held[-1])) + 1]] = True
    return core


def members_of(table: pl.DataFrame) -> dict[int, dict[str, tuple[int, ...]]]:
    """The features of each concept by site, that where its effect is largest first: what is ablated together.

    ``table`` has the columns concept, site, features and elsewhere.
    """
    rows = table.select("concept", "site", "features", "elsewhere").iter_rows(named=True)
    return {row["concept"]: members_in(row) for row in rows}


def members_in(concept: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The features of one concept by site, from its row."""
    others = {other["site"]: tuple(other["features"]) for other in concept["elsewhere"] or ()}
    return {concept["site"]: tuple(concept["features"]), **others}


def _merge_sites(at_sites: Sequence[WithActivation]) -> list[Concept]:
    """Each concept at the site of its largest effect, the others named."""
    told = []
    for sign in (1, -1):
        own = [(concept, active) for concept, active in at_sites if concept.sign == sign]
        if not own:
            continue
        for members in clusters(correlations(np.stack([active for _, active in own], 1))):
            same = sorted((own[i][0] for i in members), key=lambda c: -abs(c.fit_effect))
            here = [c for c in same if c.site == same[0].site]
            features: dict[str, tuple[int, ...]] = {}
            for c in same:
                if c.site != same[0].site:
                    features[c.site] = features.get(c.site, ()) + c.features
            told.append(
                Concept(
                    same[0].site,
                    tuple(j for c in here for j in c.features),
                    tuple(w for c in here for w in c.weights),
                    sign,
                    sum(c.fit_effect for c in here),
                    tuple(features.items()),
                )
            )
    return sorted(told, key=lambda c: (-abs(c.fit_effect), c.site, c.features))


def clusters(alike: Float[Array, "n n"]) -> list[list[int]]:
    """Groups of average-linkage clustering, cut where the mean similarity falls below :data:`TOGETHER`."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    n = len(alike)
    if n < 2:
        return [[i] for i in range(n)]
    distance = 1 - np.clip((alike + alike.T) / 2, -1, 1)
    np.fill_diagonal(distance, 0.0)
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - TOGETHER, "distance")
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


def correlations(active: Float[Array, "windows n"]) -> Float[Array, "n n"]:
    """Pearson correlations over windows; 0 for what never fires."""
    scaled = _standardised(active)
    return scaled.T @ scaled


def fire_alike(active: Float[Array, "windows n"], others: Float[Array, "windows m"]) -> Bool[Array, " n"]:
    """Whether the activations of each column correlate with those of any of the others."""
    if not others.shape[1]:
        return np.zeros(active.shape[1], dtype=bool)
    return np.asarray(correlations_between(active, others).max(1) >= TOGETHER)


def correlations_between(active: Float[Array, "windows n"], others: Float[Array, "windows m"]) -> Float[Array, "n m"]:
    """Pearson correlations over windows of the columns of two arrays; 0 for what never fires."""
    return _standardised(active).T @ _standardised(others)


def _standardised(active: Float[Array, "windows n"]) -> Float[Array, "windows n"]:
    centred = active - active.mean(0)
    norms = np.sqrt((centred**2).sum(0))
    return centred / np.where(norms > 0, norms, 1.0)


def _cosines(rows: Float[Array, "n d"]) -> Float[Array, "n n"]:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def window_sums(store: ActivationStore, sae: Sae, site: str, features: Sequence[int]) -> Float[Array, "windows n"]:
    """Σ f_j over each window of 8 tokens of the stored responses, for some features."""
    keep, window = response_windows(store, site)
    column = np.full(sae.m, -1)
    column[list(features)] = np.arange(len(features))
    total = np.zeros((int(window.max()) + 1 if window.size else 0, len(features)))
    for token, feature, value in active_entries(store, sae, site, keep):
        at = column[feature]
        np.add.at(total, (window[token[at >= 0]], at[at >= 0]), value[at >= 0])
    return total


def response_windows(store: ActivationStore, site: str) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """(the stored rows of responses, the window of each): runs of 8 tokens of one response. First tokens of a text are left
    out."""
    rows, place = store.response_rows(site)
    keep = store.column(site, "position").numpy()[rows] > 0
    return rows[keep], (np.cumsum(place % WINDOW == 0) - 1)[keep]


def concept_activations(store: ActivationStore, sae: Sae, concept: Concept) -> tuple[Array, Array]:
    """(rows of the store that belong to responses, Σ_j w_j f_j on each)."""
    keep, _ = response_windows(store, concept.site)
    weight = np.zeros(sae.m)
    weight[list(concept.features)] = concept.weights
    total = np.zeros(keep.size)
    for token, feature, value in active_entries(store, sae, concept.site, keep):
        np.add.at(total, token, value * weight[feature])
    return keep, total
