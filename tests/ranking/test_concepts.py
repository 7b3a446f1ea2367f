"""Features that fire together and have one sign are one concept, told once; the rest stays apart."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.ranking.concepts import (
    WINDOW,
    Concept,
    build_concepts,
    clusters,
    concept_activations,
    correlations,
    fire_alike,
    join_contained,
    response_windows,
    window_sums,
)
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae

D, RESPONSES, LENGTH = 6, 50, 21
SITES = ("diff.1", "diff.2")


def reading(rows: list[int]) -> Sae:
    """An SAE whose feature j is the coordinate ``rows[j]`` of the stream, with a decoder row of its own."""
    m = len(rows)
    W_enc = torch.zeros(D, m)
    W_enc[rows, range(m)] = 1.0
    own = torch.linalg.qr(torch.randn(max(m, D), max(m, D), generator=torch.Generator().manual_seed(1)))[0]
    return StandardSae(D, m).fill(
        {"W_enc": W_enc, "W_dec": own[:m, :D].contiguous(), "b_dec": torch.zeros(D), "b_enc": torch.zeros(m)}
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Each response holds one burst in coordinate 0 (and 1, twice as large), and another in coordinate 2."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    with StoreWriter(root, list(SITES), D, {"made": "for a test"}) as writer:
        for i in range(RESPONSES):
            x = torch.zeros(LENGTH, D)
            at, other = rng.integers(1, LENGTH, 2)
            x[at, 0], x[at, 1] = 1.0 + i % 3, 2.0 + 2 * (i % 3)
            x[other, 2] = 1.0
            n = torch.arange(LENGTH)
            columns = {"token": n, "pair": n * 0 + i // 2, "position": n + 5, "region": n * 0 + 1 + i % 2}
            writer.add(SITES[0], x, **columns)
            writer.add(SITES[1], x.roll(1, 0), **columns)  # the later site fires a token later
    return ActivationStore.open(root)


def frozen(features: list[int], signs: list[int], effects: list[float], prompts: int = 25) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "feature": features,
            "sign": signs,
            "fit_effect": effects,
            "rate": [e / 2 for e in effects],
            "fit_prompts": [prompts] * len(features),
        }
    )


def test_windows_cover_each_response_from_its_first_token(store: ActivationStore) -> None:
    keep, window = response_windows(store, SITES[0])
    assert keep.tolist() == list(range(RESPONSES * LENGTH))
    per_response = -(-LENGTH // WINDOW)
    assert window.tolist() == [r * per_response + t // WINDOW for r in range(RESPONSES) for t in range(LENGTH)]


def test_window_sums_are_those_of_the_dense_features(store: ActivationStore) -> None:
    sae = reading([0, 1, 2])
    keep, window = response_windows(store, SITES[0])
    f = sae.encode(store.rows(SITES[0], torch.from_numpy(keep))).double().numpy()
    expected = np.zeros((int(window.max()) + 1, 3))
    np.add.at(expected, window, f)
    np.testing.assert_allclose(window_sums(store, sae, SITES[0], [2, 0]), expected[:, [2, 0]])


def test_what_fires_together_with_one_sign_is_one_concept_told_where_its_effect_is_largest(store: ActivationStore) -> None:
    saes = {SITES[0]: reading([0, 1, 2]), SITES[1]: reading([2, 0])}
    tables = {SITES[0]: frozen([0, 1, 2], [1, 1, 1], [0.2, 0.3, 0.1]), SITES[1]: frozen([0, 1], [1, 1], [0.4, 0.2])}
    concepts = build_concepts(store, saes, tables)
    told = {(c.site, c.features): c for c in concepts}
    assert set(told) == {("diff.1", (0, 1)), ("diff.2", (0,))}
    assert told["diff.1", (0, 1)].elsewhere == (("diff.2", (1,)),)
    assert told["diff.2", (0,)].elsewhere == (("diff.1", (2,)),)
    assert [c.fit_effect for c in concepts] == pytest.approx([0.5, 0.4])
    assert told["diff.1", (0, 1)].weights == pytest.approx((0.1, 0.15))


def test_features_of_opposite_sign_or_of_few_prompts_are_not_joined(store: ActivationStore) -> None:
    saes = {SITES[0]: reading([0, 1, 2])}
    apart = build_concepts(store, saes, {SITES[0]: frozen([0, 1, 2], [1, -1, 1], [0.2, -0.3, 0.1])})
    assert [(c.features, c.sign) for c in apart] == [((1,), -1), ((0,), 1), ((2,), 1)]
    assert build_concepts(store, saes, {SITES[0]: frozen([0, 1], [1, 1], [0.2, 0.3], prompts=19)}) == []
    assert len(build_concepts(store, saes, {SITES[0]: frozen([0, 1, 2], [1, -1, 1], [0.2, -0.3, 0.1])}, most=2)) == 2


def one(feature: int, effect: float) -> Concept:
    return Concept("both.1", (feature,), (1.0,), 1, effect)


def test_what_fires_only_inside_a_larger_concept_joins_it() -> None:
    active = np.zeros((100, 5))
    active[:10, 0] = 1.0  # the largest
    active[:7, 1], active[40:43, 1] = 0.1, 0.1  # .7 of it inside
    active[:6, 2], active[40:44, 2] = 0.1, 0.1  # .6 of it inside
    active[:5, 3], active[50:52, 3] = 1.0, 1.0  # .71 inside
    joined = join_contained([(one(j, 0.5 - 0.1 * j), active[:, j]) for j in range(4)])
    assert [concept.features for concept, _ in joined] == [(0, 1, 3), (2,)]
    assert joined[0][0].fit_effect == pytest.approx(0.5 + 0.4 + 0.2)
    np.testing.assert_array_equal(joined[0][1], active[:, [0, 1, 3]].sum(1))


def test_what_fires_almost_everywhere_takes_nothing_in() -> None:
    active = np.zeros((100, 2))
    active[:40, 0] = 1.0  # .36 of the windows hold .9 of it, so three times as much cannot be inside
    active[:5, 1] = 1.0
    joined = join_contained([(one(j, 0.5 - 0.1 * j), active[:, j]) for j in range(2)])
    assert [concept.features for concept, _ in joined] == [(0,), (1,)]


def test_a_concepts_activation_is_the_weighted_sum_of_its_features(store: ActivationStore) -> None:
    sae = reading([0, 1, 2])
    [concept] = build_concepts(store, {SITES[0]: sae}, {SITES[0]: frozen([0, 1], [1, 1], [0.2, 0.3])})
    keep, activation = concept_activations(store, sae, concept)
    f = sae.encode(store.rows(SITES[0], torch.from_numpy(keep))).double().numpy()
    np.testing.assert_allclose(activation, f[:, list(concept.features)] @ np.array(concept.weights))


def test_linkage_is_an_average_and_what_never_fires_is_alone() -> None:
    alike = np.array([[1, 0.9, 0.4], [0.9, 1, 0.8], [0.4, 0.8, 1]])
    assert sorted(map(sorted, clusters(alike))) == [[0, 1], [2]]  # .6 on average
    alike[0, 2] = alike[2, 0] = 0.7
    assert [sorted(g) for g in clusters(alike)] == [[0, 1, 2]]
    active = np.array([[0.0, 1.0, 1.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert correlations(active)[0].tolist() == [0, 0, 0]
    assert correlations(active)[1, 2] == pytest.approx(1)
    assert clusters(np.ones((1, 1))) == [[0]]


def test_what_fires_alike_is_found_again_whatever_its_scale() -> None:
    rng = np.random.default_rng(0)
    active = rng.random((200, 3))
    others = np.c_[3 * active[:, 1] + 0.1 * rng.random(200), rng.random(200)]
    assert fire_alike(active, others).tolist() == [False, True, False]
    assert fire_alike(active, others[:, :0]).tolist() == [False, False, False]
