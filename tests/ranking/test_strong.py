"""Strong firings: which they are, what is reported for them, and what that is held to elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.planted.results import Candidate
from rmscope.ranking.candidates import strongest
from rmscope.ranking.confirm import confirm
from rmscope.run import collect
from rmscope.run.data import RunData
from rmscope.studies.audit.scoring import FRESH_PROMPTS, JUDGED, replication_requests
from tests.ranking.ranked import frozen, measured


def summed(sums: dict[tuple[int, int, str], float], feature: int = 0) -> pl.DataFrame:
    """Σ_t f_tj by (prompt, pair of the prompt, side), in the order given."""
    rows = [(f"{p}-{i}", s, f"p{p}", feature, value, n) for n, ((p, i, s), value) in enumerate(sums.items())]
    return pl.DataFrame(rows, schema=["pair", "side", "prompt", "feature", "effect", "order"], orient="row")


@pytest.mark.parametrize(("prompts", "least", "kept"), [(60, 2, 6), (60, 20, 20), (30, 2, 3), (19, 20, 0)])
def test_the_strongest_firings_are_one_a_prompt_of_the_hardest_prompts(prompts: int, least: int, kept: int) -> None:
    rng = np.random.default_rng(0)
    sums = {(p, i, s): float(rng.random()) for p in range(prompts) for i in range(5) for s in ("chosen", "rejected")}
    del sums[3, 1, "rejected"]
    sums |= {(3, 1, "chosen"): 9.0, (3, 2, "chosen"): 8.0, (7, 0, "rejected"): 7.0}
    table = summed(sums)
    found = strongest(table, [0], prompts=100, least=least)
    best: dict[int, tuple[int, int, str]] = {}
    for key in sorted(sums, key=lambda key: -sums[key]):
        best.setdefault(key[0], key)
    hardest = list(best.values())[:kept]
    assert set(found.filter("strong").select("pair", "side").rows()) == {(f"{p}-{i}", s) for p, i, s in hardest}
    pairs = {(p, i) for p, i, _ in hardest}
    assert set(found.select("pair", "side").rows()) == {(f"{p}-{i}", s) for p, i, s in sums if (p, i) in pairs}
    assert strongest(table, [0], prompts=2, least=least).filter("strong").height == min(2, kept)
    assert strongest(table, [1], prompts=100, least=1).is_empty()


def test_what_does_much_where_it_fires_hardest_alone_is_reported_for_that() -> None:
    """Weak in most responses: 0 lowers the reward where it is strong, 1 does nothing anywhere, 2 turns around where it is
    strong, 3 has no strong firings on enough prompts, 4 is frozen with the other sign."""
    rng = np.random.default_rng(0)

    def around(mean: float) -> np.ndarray:
        return mean + 0.02 * rng.normal(size=30)

    weak = {0: around(-0.04), 1: around(-0.03), 2: around(0.03), 3: around(-0.04), 4: around(-0.04)}
    hard = {0: around(-0.7), 1: around(-0.03), 2: around(-0.7), 4: around(-0.7)}
    list_ = frozen({0: -1, 1: -1, 2: -1, 3: -1, 4: 1})
    strong = measured(hard).with_columns(pl.lit(True).alias("strong"))
    other_side = measured({0: around(50.0)}, side="rejected").with_columns(pl.lit(False).alias("strong"))
    table = confirm({"s": list_}, {"s": measured(weak)}, 1.0, 0, strong={"s": pl.concat([strong, other_side])})["s"]
    rows = {r["feature"]: r for r in table.iter_rows(named=True)}
    assert {f for f, r in rows.items() if r["reported"]} == {0}
    assert rows[0]["q"] > 0.5
    assert rows[0]["q_strong"] < 0.05
    assert rows[0]["strong_effect"] == pytest.approx(hard[0].mean())
    assert rows[0]["strong_low"] < hard[0].mean() < rows[0]["strong_high"]
    assert (rows[0]["n_strong"], rows[0]["strong_consistency"]) == (30, 1.0)
    assert rows[2]["q_strong"] is None  # in general it raises the reward, so its strong firings are not asked
    assert rows[3]["strong_effect"] is None
    assert rows[3]["q_strong"] is None
    assert rows[4]["q_strong"] > 0.9
    without = confirm({"s": list_}, {"s": measured(weak)}, 1.0, 0)["s"]
    assert not without["reported"].any()
    assert without["q_strong"].is_null().all()
    assert without.columns == table.columns


def test_strong_noise_is_seldom_reported() -> None:
    runs = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise, hard = ({f: rng.normal(size=25) * rng.exponential() for f in range(30)} for _ in range(2))
        signs = {f: int(rng.choice([-1, 1])) for f in range(30)}
        strong = measured(hard).with_columns(pl.lit(True).alias("strong"))
        table = confirm({"s": frozen(signs)}, {"s": measured(noise)}, 1.0, seed, strong={"s": strong})["s"]
        runs.append(table["reported"].any())
    assert sum(runs) <= 2


def test_a_feature_has_one_p_of_which_the_smaller_test_counts_doubled() -> None:
    rng = np.random.default_rng(0)
    large, noise = 0.2 + 0.3 * rng.normal(size=30), {f: 0.3 * rng.normal(size=30) for f in range(1, 61)}
    list_ = frozen(dict.fromkeys(range(61), 1))

    def q_of(values: np.ndarray | None = None) -> tuple[float, float | None]:
        strong = {} if values is None else {"s": measured({0: values}).with_columns(pl.lit(True).alias("strong"))}
        table = confirm({"s": list_}, {"s": measured({0: large} | noise)}, 1.0, 0, strong=strong)["s"]
        return table.filter(pl.col("feature") == 0).select("q", "q_strong").row(0)

    alone, by_mean = q_of()[0], q_of(0.01 + 0.3 * rng.normal(size=30))
    assert by_mean[0] == pytest.approx(2 * alone)
    assert by_mean[1] is not None
    assert by_mean[1] > by_mean[0]
    by_strong = q_of(5 + 0.3 * rng.normal(size=30))
    assert by_strong[1] is not None
    assert by_strong[1] < alone < by_strong[0]


def test_on_fresh_pairs_a_feature_is_held_to_what_it_was_reported_for() -> None:
    """Two features fire in the same way, in five pairs of each of 30 prompts: 0 is ablated on any, 1 on its hardest."""
    rng = np.random.default_rng(0)
    sums = {(p, i, "chosen"): float(rng.random()) for p in range(30) for i in range(5)}
    ordered = pl.concat([summed(sums, feature) for feature in (0, 1)])
    rows = replication_requests(ordered, pl.DataFrame({"feature": [0, 1], "strong": [False, True]}))
    first = {f"{p}-0" for p in range(30)}  # the common order is that of the pairs
    assert set(rows.filter(pl.col("feature") == 0)["pair"]) <= first
    best = {p: max(range(5), key=lambda i: sums[p, i, "chosen"]) for p in range(30)}
    hardest = sorted(best, key=lambda p: -sums[p, best[p], "chosen"])[:JUDGED]
    assert set(rows.filter(pl.col("feature") == 1)["pair"]) == {f"{p}-{best[p]}" for p in hardest}
    assert rows.filter(pl.col("feature") == 0).height == FRESH_PROMPTS


def test_the_sign_of_a_strong_feature_is_that_of_its_strong_firings(monkeypatch: pytest.MonkeyPatch) -> None:
    features = pl.DataFrame(
        {
            "feature": [3, 1, 0, 2], "rank": [3, 2, 1, 4], "reported": [False, True, True, True],
            "mean_effect": [0.5, -0.5, 0.5, 0.5], "sign_consistency": [0.7, 0.7, 0.7, 0.7],
            "strong_consistency": [1.0, 1.0, 1.0, None], "flags": [[], [], ["strong"], ["ending"]],
        }
    )  # fmt: skip
    monkeypatch.setattr(collect, "firings", lambda _store, _sae, _site, features: np.eye(len(features)))
    sae = SimpleNamespace(W_dec=torch.eye(4))
    run: Any = SimpleNamespace(features=lambda _site: features, saes={"s": sae}, store=None)
    run.reported = lambda site: RunData.reported(run, site)
    assert collect.best_reported(run, "s") == [Candidate(0, 1, 0.5, 1.0, ("strong",)), Candidate(1, 2, -0.5, 0.7)]
