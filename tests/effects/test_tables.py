"""Effect tables: sparse, in file order whatever the batches were, and plans that ask for what a table names."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from rmscope.effects import tables
from rmscope.effects.ledger import SILENT, baseline, ledger_rows
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.ranking.estimate_quality import quality_sample
from tests.model.small import ENCODER, EOS, PAIRS, shared_pm, small_pm, small_sae

SITES = ["resid_post.0", "resid_post.2"]
IDS = [p.id for p in PAIRS]
SAES = {site: small_sae(seed=i) for i, site in enumerate(SITES)}


def estimated(rm: RewardModel, pairs: list[Pair] = PAIRS) -> dict[str, pl.DataFrame]:
    return tables.estimate_table(rm, SAES, rm.tokenize_all(pairs), [p.id for p in pairs], range(len(pairs)))


def in_file_order(table: pl.DataFrame) -> bool:
    keys = [(IDS.index(p), SIDES.index(s), f) for p, s, f in table.select("pair", "side", "feature").iter_rows()]
    return keys == sorted(keys) and len(set(keys)) == len(keys)


@pytest.mark.parametrize("architecture", ["llama", "mistral", ENCODER])
def test_estimates_firings_and_ablations_speak_of_the_same_entries(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = rm.tokenize_all(PAIRS)
    estimates = estimated(rm)
    firing = tables.firing_table(rm, SAES, tokens, IDS, range(len(PAIRS)))
    wanted = tables.plan(estimates, {i: n for n, i in enumerate(IDS)}) if rm.capabilities.resume else {}
    ablated = tables.ablation_table(rm, SAES, tokens, IDS, wanted)
    for site in SITES:
        table = estimates[site]
        assert dict(zip(table.columns, table.dtypes, strict=True)) == {**tables.SCHEMA, "mass": pl.Float32}
        assert table["kind"].unique().to_list() == ["ablation_estimate"]
        assert set(table.select("pair", "side").iter_rows()) == {(i, s) for i in IDS for s in SIDES}
        assert in_file_order(table)
        assert table.select("pair", "side", "feature").equals(firing[site].select("pair", "side", "feature"))
        norms = SAES[site].W_dec.norm(dim=1)[table["feature"].to_numpy()]
        torch.testing.assert_close(firing[site]["effect"].to_torch() * norms, table["mass"].to_torch(), rtol=1e-4, atol=1e-5)
        if rm.capabilities.resume:
            assert table.select("pair", "side", "feature").equals(ablated[site].select("pair", "side", "feature"))
            assert ablated[site].schema == tables.SCHEMA
            assert ablated[site]["kind"].unique().to_list() == ["ablation"]


def test_a_unit_alone_gives_the_rows_it_gives_among_others() -> None:
    rm = shared_pm("llama")
    tokens, whole = rm.tokenize_all(PAIRS), estimated(rm)
    parts = [tables.estimate_table(rm, SAES, tokens, IDS, unit) for unit in ([0, 1], [2, 3])]
    for site in SITES:
        joined = pl.concat([p[site] for p in parts])
        assert joined.select("pair", "side", "feature").equals(whole[site].select("pair", "side", "feature"))
        torch.testing.assert_close(joined["effect"].to_torch(), whole[site]["effect"].to_torch(), atol=1e-4, rtol=1e-4)


def test_the_same_work_twice_gives_the_same_bytes() -> None:
    rm = shared_pm("llama")
    for first, second in zip(estimated(rm).values(), estimated(rm).values(), strict=True):
        assert first.equals(second)


def test_a_response_without_a_span_has_no_rows_and_breaks_no_table() -> None:
    rm = small_pm("llama", append_eos=True, pad_token_id=EOS)
    tokens = rm.tokenize_all(PAIRS)
    found = {
        "estimates": estimated(rm),
        "firing": tables.firing_table(rm, SAES, tokens, IDS, range(4)),
        "ablations": tables.ablation_table(rm, SAES, tokens, IDS, {2: {s: {SITES[0]: None, SITES[1]: [3]} for s in SIDES}}),
    }
    for by_site in found.values():
        rows = by_site[SITES[0]].filter(pl.col("pair") == "prefix")
        assert rows["side"].unique().to_list() == ["rejected"]


def test_a_plan_asks_once_for_each_entry_in_file_order() -> None:
    rows = [("b", "rejected", 5), ("a", "chosen", 9), ("b", "rejected", 2), ("a", "chosen", 9)]
    other = [("b", "chosen", 1)]
    columns = ["pair", "side", "feature"]
    plan = tables.plan(
        {"x": pl.DataFrame(rows, columns, orient="row"), "y": pl.DataFrame(other, columns, orient="row")}, {"a": 7, "b": 3}
    )
    assert list(plan) == [3, 7]
    assert plan == {3: {"rejected": {"x": [2, 5]}, "chosen": {"y": [1]}}, 7: {"chosen": {"x": [9]}}}


def ordered(estimates: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    return tables.with_order(estimates, {i: ("one" if i in IDS[:2] else i) for i in IDS}, seed)


def test_the_order_is_one_number_a_response_and_the_same_for_all_features() -> None:
    table = ordered(estimated(shared_pm("llama"))[SITES[0]])
    per_response = table.group_by("pair", "side").agg(pl.col("order").n_unique(), pl.col("order").first().alias("at"))
    assert (per_response["order"] == 1).all()
    assert sorted(per_response["at"]) == list(range(2 * len(PAIRS)))
    assert set(table.filter(pl.col("pair") == IDS[1])["prompt"]) == {"one"}


def test_the_quality_sample_takes_new_prompts_first_and_stands_for_all_features() -> None:
    estimates = ordered(estimated(shared_pm("llama"))[SITES[0]])
    sampled = quality_sample(estimates, 3, 0)
    responses = sampled.select("pair", "side", "prompt").unique()
    assert responses.height == responses["prompt"].n_unique() == 3
    for pair, side in responses.select("pair", "side").iter_rows():
        mine = sampled.filter((pl.col("pair") == pair) & (pl.col("side") == side))
        population = estimates.filter((pl.col("pair") == pair) & (pl.col("side") == side))
        assert mine["weight"].sum() == pytest.approx(population.height)
        assert mine["feature"].is_in(population["feature"].implode()).all()
    assert "estimate" in sampled.columns
    more = quality_sample(estimates, 100, 0)
    assert more.select("pair", "side").unique().height == 2 * len(PAIRS)
    assert quality_sample(estimates, 3, 0).equals(sampled)


def test_ledger_and_contributions_hold_each_others_sums() -> None:
    rm, site = shared_pm("llama"), SITES[0]
    sae = SAES[site]
    start = baseline(sae, "mean", torch.full((sae.m,), 0.01), torch.full((sae.d,), 0.1))
    rows = list(ledger_rows(rm, sae, site, rm.tokenize_all(PAIRS), range(len(PAIRS)), start, 1.0))
    found = tables.ledger_tables(rows, IDS)
    ledger, contribution = found["ledger"], found["contribution"]
    assert ledger.schema == tables.LEDGER
    assert contribution.schema == tables.SCHEMA
    assert sorted(ledger["pair"]) == sorted(IDS)
    assert (contribution.group_by("pair", "side").agg((pl.col("feature") == SILENT).sum())["feature"] == 1).all()
    signed = contribution.with_columns(
        pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect")).alias("signed")
    )
    sums = dict(signed.group_by("pair").agg(pl.col("signed").sum()).iter_rows())
    for row in ledger.iter_rows(named=True):
        assert sums[row["pair"]] == pytest.approx(row["features"], abs=1e-4)
        assert row["delta_r"] == pytest.approx(row["features"] + row["error"] + row["remainder"] + row["gap"])


def test_no_rows_give_tables_with_the_columns_of_others() -> None:
    rm = shared_pm("llama")
    empty = tables.ablation_table(rm, SAES, rm.tokenize_all(PAIRS), IDS, {})
    assert all(t.height == 0 and t.schema == tables.SCHEMA for t in empty.values())
    assert tables.ledger_tables([], IDS)["ledger"].schema == tables.LEDGER
