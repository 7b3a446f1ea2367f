"""Concepts in SAEs of another seed: known where the other SAE is a shuffled copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.ranking.counterparts import counterparts, firing_alike
from rmscope.sae.base import Sae
from tests.model.small import small_sae

SITES = ("resid_post.0", "resid_post.1")


def store_of(folder: Path, d: int) -> ActivationStore:
    n = 4000
    with StoreWriter(folder, SITES, d, {"model": "small"}) as writer:
        for i, site in enumerate(SITES):
            x = torch.randn(n, d, generator=torch.Generator().manual_seed(i))
            ones = torch.ones(n, dtype=torch.long)
            writer.add(site, x, 0 * ones, torch.arange(n) // 40, 1 + torch.arange(n) % 40, ones)
    return ActivationStore.open(folder)


def shuffled(sae: Sae, order: torch.Tensor) -> Sae:
    """The same SAE with its features in another order."""
    weights = {"W_dec": sae.W_dec[order], "W_enc": sae.W_enc[:, order], "b_dec": sae.b_dec, "b_enc": sae.b_enc[order]}
    return small_sae(m=sae.m, d=sae.d).fill(weights)


def test_in_a_shuffled_copy_the_counterpart_is_the_same_features(tmp_path: Path) -> None:
    saes = {site: small_sae(seed=i) for i, site in enumerate(SITES)}
    store = store_of(tmp_path / "store", saes[SITES[0]].d)
    order = torch.randperm(saes[SITES[0]].m, generator=torch.Generator().manual_seed(3))
    other = {site: shuffled(saes[site], order) for site in SITES}
    concepts = pl.DataFrame(
        {
            "concept": [4], "site": [SITES[0]], "features": [[3, 11]], "weights": [[1.0, 0.5]],
            "elsewhere": [[{"site": SITES[1], "features": [20]}]],
        }
    )  # fmt: skip
    (found,) = counterparts(store, saes, [other], concepts)
    place = {int(old): new for new, old in enumerate(order)}
    assert set(found[4]) == set(SITES)
    assert {place[3], place[11]} <= set(found[4][SITES[0]])
    assert place[20] in found[4][SITES[1]]
    assert len(found[4][SITES[0]]) <= 4  # a random SAE has few features that fire alike


def test_what_fires_alike_is_found_by_correlation_and_what_never_fires_is_not() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 400))
    others = np.stack([2 * a + 1, b, np.zeros(400), a + 0.3 * b, -a], 1)
    assert firing_alike(a[:, None], others) == (0, 3)
    assert firing_alike(np.zeros((400, 1)), others) == ()
