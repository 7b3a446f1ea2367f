"""What ledgers say: shares within groups, thirds by length, and a pair's features against dense sums over its text."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.effects import tables
from rmscope.effects.ledger import (
    PARTS,
    SILENT,
    baseline,
    ledger_rows,
    length_groups,
    pair_features,
    share_rows,
    shares_by,
)
from rmscope.pairs.pair import SIDES
from tests.model.small import PAIRS, shared_pm, small_sae


def random_ledger(pairs: int, weights: tuple[float, ...], seed: int = 0) -> pl.DataFrame:
    parts = np.random.default_rng(seed).normal(size=(pairs, len(PARTS))) * weights
    columns = dict(zip(PARTS, parts.T, strict=True))
    return pl.DataFrame({"pair": [str(i) for i in range(pairs)], "delta_r": parts.sum(1), **columns})


def test_the_part_that_varies_alone_has_the_whole_share_and_the_interval_holds_it() -> None:
    rows = {r["part"]: r for r in share_rows(random_ledger(60, (1.0, 0.0, 0.0, 0.0, 0.0)), [str(i) for i in range(60)])}
    assert rows["features"]["value"] == pytest.approx(1.0)
    assert rows["error"]["value"] == pytest.approx(0.0)
    mixed = share_rows(random_ledger(60, (1.0, 0.5, 0.0, 0.2, 0.0)), [str(i) for i in range(60)])
    assert sum(r["value"] for r in mixed) == pytest.approx(1.0)
    assert all(r["low"] <= r["value"] <= r["high"] for r in mixed)
    assert [r["part"] for r in mixed] == [part for part in PARTS if part != "constant"]  # it is always 0 here
    every = share_rows(random_ledger(60, (1.0, 0.5, 0.3, 0.2, 0.0)), [str(i) for i in range(60)])
    assert [r["part"] for r in every] == list(PARTS)


def test_a_group_has_the_shares_of_its_own_pairs_and_a_small_one_none() -> None:
    first, second = random_ledger(20, (1.0, 0.0, 0.0, 0.0, 0.0)), random_ledger(20, (0.0, 0.0, 0.0, 2.0, 0.0), 1)
    table, groups = pl.concat([first, second, first.head(3)]), ["a"] * 20 + ["b"] * 20 + ["c"] * 3
    found = {(r["group"], r["part"]): r for r in shares_by(table, groups, [str(i) for i in range(43)])}
    assert {g for g, _ in found} == {"a", "b"}
    assert found["a", "features"]["value"] == pytest.approx(1.0)
    assert found["b", "remainder"]["value"] == pytest.approx(1.0)
    assert found["a", "features"]["pairs"] == 20


def test_thirds_by_length_are_even_and_ordered() -> None:
    difference = np.random.default_rng(0).integers(-50, 50, 31)
    groups = np.array(length_groups(difference))
    sizes = [int((groups == g).sum()) for g in np.unique(groups)]
    assert sorted(sizes) == [10, 10, 11]
    means = [difference[groups == g].mean() for g in sorted(np.unique(groups))]
    assert means == sorted(means)


def test_a_pairs_features_are_its_largest_contributions_with_the_tokens_they_fire_on() -> None:
    rm, sae, site = shared_pm("llama"), small_sae(), "resid_post.1"
    start = baseline(sae, "mean", torch.full((sae.m,), 0.01), torch.full((sae.d,), 0.1))
    tokens = rm.tokenize_all(PAIRS)
    rows = list(ledger_rows(rm, sae, site, tokens, range(len(PAIRS)), start, 10.0))
    contribution = tables.ledger_tables(rows, [p.id for p in PAIRS])["contribution"]
    mine = contribution.filter(pl.col("pair") == "paris")
    found = pair_features(rm, sae, site, tokens[0], mine, 5)
    for side in SIDES:
        part, whole = (t.filter(pl.col("side") == side) for t in (found, mine))
        assert part["effect"].abs().to_list() == whole["effect"].abs().sort(descending=True).head(5).to_list()
        t = tokens[0]
        f = sae.encode(rm.prefill(t.side(side), [site]).streams[site])[t.divergence :]
        texts = [rm.tokenizer.decode([int(i)]) for i in t.side(side)[t.divergence :]]
        for j, activation, shown in part.select("feature", "activation", "tokens").iter_rows():
            if j == SILENT:
                assert shown == "(silent features)"
                continue
            assert activation == pytest.approx(float(f[:, j].sum()), abs=1e-4)
            assert shown.split("|")[0] == texts[int(f[:, j].argmax())]
