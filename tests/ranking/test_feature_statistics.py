"""The statistics on a constructed store: x_j itself is feature j, so every rate, mean and flag is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rmscope.activations.store import StoreWriter
from rmscope.ranking.feature_statistics import FeatureStatistics, _held_out_r2, feature_statistics
from rmscope.sae.standard import StandardSae

D, PAIRS, LENGTH, PROMPT = 200, 80, 20, 6
SITE = "resid_post.0"
DENSE, SPARSE, PROMPT_ONLY, LEXICAL, CASES, NOISY, HALF, HERE, ANYWHERE, LAST, EVEN = range(11)
OUTLIER, ORDINARY, NEARLY = 20, 21, 22


def constructed() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    n = PAIRS * LENGTH
    pair, position = np.divmod(np.arange(n), LENGTH)
    region = np.where(position < PROMPT, 0, 1 + (pair // 2) % 2)
    token = rng.integers(0, 12, n)
    token[(token == 11) & (pair % 2 == 1)] = 10  # token 11 only in even pairs
    response, x = region > 0, np.zeros((n, D), dtype=np.float32)
    x[:, DENSE] = rng.random(n) < 0.2
    x[:, SPARSE] = rng.random(n) < 0.05
    x[:, PROMPT_ONLY] = ~response
    x[:, LEXICAL] = 3.0 * (token == 7)
    x[:, CASES] = 2.0 * ((token == 8) | (token == 9))
    x[:, NOISY] = (token == 7) * rng.exponential(size=n)
    x[:, HALF] = 2.0 * (token == 9)
    x[:, HERE] = 2.0 * (position == 9)
    x[:, ANYWHERE] = rng.random(n) < 0.05
    x[:, LAST] = rng.random(n) < (position == 12) * 0.3
    x[:, EVEN] = 1.0 * (token == 11)
    x[:, 100:102] = 50 * rng.normal(size=(n, 2))  # the 1 % of dimensions with the largest variance
    x[position == 0] = 1000.0  # the attention sink stays out of everything
    return x, {"token": token, "pair": pair, "position": position, "region": region}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> FeatureStatistics:
    return count(tmp_path_factory.mktemp("store"), {9: 8})


def count(root: Path, joined: dict[int, int]) -> FeatureStatistics:
    x, columns = constructed()
    with StoreWriter(root, [SITE], D, {"model": "toy", "data": "toy"}, shard_tokens=333) as writer:
        writer.add(SITE, torch.from_numpy(x), **{k: torch.from_numpy(v) for k, v in columns.items()})
    from rmscope.activations.store import ActivationStore

    sae = StandardSae(D, D)
    decoder = torch.eye(D)
    decoder[OUTLIER] = torch.zeros(D).index_fill(0, torch.tensor([100, 5]), 1.0)  # exactly half
    decoder[NEARLY] = torch.zeros(D).index_fill(0, torch.tensor([101, 5, 6]), 1.0)
    encoder = torch.eye(D)
    encoder[100:102] = 0.0
    sae.fill({"W_enc": encoder, "W_dec": decoder, "b_dec": torch.zeros(D), "b_enc": torch.zeros(D)})
    return feature_statistics(ActivationStore.open(root), sae, SITE, lambda t: joined.get(t, t))


def flagged(counted: FeatureStatistics, flag: str) -> set[int]:
    return set(np.flatnonzero(counted.flags[flag]).tolist())


def test_rates_and_means_are_those_of_the_rows_behind_position_0(counted: FeatureStatistics) -> None:
    x, c = constructed()
    keep = c["position"] > 0
    f = np.where(np.isin(np.arange(D), [100, 101]), 0.0, np.maximum(x, 0.0))
    for region, rate in enumerate((counted.fire_prompt, counted.fire_chosen, counted.fire_rejected)):
        np.testing.assert_allclose(rate, (f[keep & (c["region"] == region)] > 0).mean(0))
    response = keep & (c["region"] > 0)
    np.testing.assert_allclose(counted.f_mean, f[response].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(counted.x_mean, x[response].mean(0), rtol=1e-4, atol=1e-5)


def test_dense_fires_on_a_tenth_of_the_responses_tokens(counted: FeatureStatistics) -> None:
    assert DENSE in flagged(counted, "dense")
    assert not {SPARSE, PROMPT_ONLY, HERE, ANYWHERE} & flagged(counted, "dense")
    assert counted.fire_prompt[PROMPT_ONLY] == 1.0


def test_outlier_lies_on_the_dimensions_of_largest_variance(counted: FeatureStatistics) -> None:
    assert flagged(counted, "outlier") == {OUTLIER, 100, 101}


def test_lexical_is_told_by_the_token_on_other_pairs(counted: FeatureStatistics, tmp_path: Path) -> None:
    assert {LEXICAL, CASES} <= flagged(counted, "lexical")
    assert not {NOISY, HALF, HERE, ANYWHERE, DENSE, EVEN, ORDINARY} & flagged(counted, "lexical")
    apart = count(tmp_path, {})  # without joining the two cases, the feature of one of them is lexical too
    assert {LEXICAL, CASES, HALF} <= flagged(apart, "lexical")


def test_the_held_out_r2_is_that_of_predicting_by_the_mean_at_the_same_key() -> None:
    rng = np.random.default_rng(1)
    n, m = 300, 6
    key, held_out = rng.integers(0, 9, n), rng.random(n) < 0.4
    f = (rng.random((n, m)) < 0.5) * rng.random((n, m)) + (key[:, None] % np.arange(1, m + 1) == 0)
    f[:, 5] = 0.0
    row, feature = f.nonzero()
    found = _held_out_r2(key, row, feature, f[row, feature], held_out, m)
    train, test = f[~held_out], f[held_out]
    means = np.stack([train[key[~held_out] == k].mean(0) for k in range(9)])
    residual = ((test - means[key[held_out]]) ** 2).sum(0)
    expected = 1 - residual[:5] / ((test - test.mean(0)) ** 2).sum(0)[:5]
    np.testing.assert_allclose(found[:5], expected, rtol=1e-6)
    assert found[5] == 0.0
    assert expected.max() > 0.5


def test_position_is_told_by_the_place_on_other_pairs(counted: FeatureStatistics) -> None:
    assert HERE in flagged(counted, "position")
    assert not {ANYWHERE, LAST, LEXICAL, DENSE, ORDINARY} & flagged(counted, "position")


def test_the_flags_of_a_feature_are_a_list_of_names(counted: FeatureStatistics) -> None:
    assert counted.flags_of(LEXICAL) == ["lexical"]
    assert counted.flags_of(SPARSE) == []
    assert set(counted.flags_of(PROMPT_ONLY)) <= {"position"}


def test_top_tokens_are_shares_of_the_activation_and_equal_texts_are_joined(counted: FeatureStatistics) -> None:
    assert counted.top_tokens(LEXICAL, str) == [("7", pytest.approx(1.0))]
    both = dict(counted.top_tokens(CASES, str))
    assert set(both) == {"8", "9"}
    assert sum(both.values()) == pytest.approx(1.0)
    assert counted.top_tokens(CASES, lambda _t: "x") == [("x", pytest.approx(1.0))]
    many = counted.top_tokens(DENSE, str, n=3)
    assert len(many) == 3
    assert [s for _, s in many] == sorted((s for _, s in many), reverse=True)
    assert counted.top_tokens(ORDINARY, str) == []
