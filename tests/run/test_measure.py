"""What is told of a concept comes from the measure split, and from more than one dictionary."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.effects.across import Members
from rmscope.io import silent, write_table
from rmscope.ranking.concepts import members_of
from rmscope.ranking.counterparts import counterparts
from rmscope.run.concept_table import concept_table
from rmscope.run.measure import measure, measured_values
from rmscope.run.run import Run
from tests.effects.naive import ablate_naively
from tests.run.small import forget_checksums

PROMPTS = {f"p{i}": f"prompt {i // 2}" for i in range(40)}


def effects(concept: int, kind: str, values: list[float]) -> pl.DataFrame:
    """One chosen response per prompt."""
    pairs = [f"p{2 * i}" for i in range(len(values))]
    return pl.DataFrame({"concept": concept, "pair": pairs, "side": "chosen", "kind": kind, "effect": values})


def test_means_are_over_prompts_and_a_dictionary_holds_where_sign_and_size_do() -> None:
    rng = np.random.default_rng(0)
    own, weak, turned = (rng.normal(mean, 0.01, 20).tolist() for mean in (0.3, 0.02, -0.3))
    again = pl.DataFrame({"concept": 1, "pair": "p1", "side": "rejected", "kind": "own", "effect": [own[0] + 2]})
    table = pl.concat(
        [
            *(effects(1, "own", own), again, effects(1, "by_place", weak), effects(1, "by_token", [0.5] * 7)),
            *(effects(1, "seed 1", turned), effects(1, "seed 2", own), effects(2, "own", [0.4] * 5)),
        ]
    )
    one, two = measured_values(table, PROMPTS, {1: 1, 2: 1}, 0.05, ["seed 1", "seed 2"]).iter_rows(named=True)
    assert one["measured"] == pytest.approx(np.mean([own[0] + 1, *own[1:]]))  # both sides of a prompt count once
    assert one["measured_low"] < one["measured"] < one["measured_high"]
    assert one["n_measured"] == 20
    assert one["by_place"] == pytest.approx(np.mean(weak))
    assert one["by_token"] is None  # fewer than eight prompts
    assert one["seed_effects"] == pytest.approx([np.mean(turned), np.mean(own)])
    assert one["seeds_held"] == 2  # the run's own and seed 2; seed 1 has the other sign
    assert (two["measured"], two["n_measured"], two["seeds_held"]) == (None, 5, 0)


def ranked(concept: int, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("mean_effect", "strong_effect"), 0.5)
    ends = dict.fromkeys(("ci_low", "strong_low"), 0.4) | dict.fromkeys(("ci_high", "strong_high"), 0.6)
    row = {"concept": concept, "flags": ["lexical"], "reported": True, **figures, **ends, "n": 30, "n_strong": 30}
    return row | changes


@pytest.fixture
def told() -> dict[int, dict[str, Any]]:
    rows = [ranked(0), ranked(1), ranked(2, flags=["strong"]), ranked(3), ranked(4, reported=False)]
    directions = pl.DataFrame(
        {"concept": [0, 1, 2, 3], "own": [0.5, 0.5, 0.5, -0.5], "null_random": [0.1, 0.6, 0.1, 0.2],
         "null_real": [0.2, 0.1, 0.1, 0.3], "n_null": [8] * 4}
    )  # fmt: skip
    measured = pl.DataFrame(
        {"concept": [0, 1, 2, 3], "measured": [0.3, 0.3, 0.2, None], "measured_low": [0.2, 0.2, 0.1, None],
         "measured_high": [0.4, 0.4, 0.3, None], "n_measured": [20, 20, 12, 3],
         "seed_effects": [[0.3, None], [0.0, 0.0]] * 2, "seeds_held": [2, 1, 1, 0]},
        schema_overrides={"seed_effects": pl.List(pl.Float64)},
    )  # fmt: skip
    return {row["concept"]: row for row in concept_table(pl.DataFrame(rows), directions, measured).iter_rows(named=True)}


def test_values_are_those_of_the_measure_split_and_the_ranks_own_are_kept(told: dict[int, dict[str, Any]]) -> None:
    assert [told[0][name] for name in ("mean_effect", "ci_low", "ci_high", "n")] == [0.3, 0.2, 0.4, 20]
    assert [told[0][f"confirm_{name}"] for name in ("effect", "low", "high", "n")] == [0.5, 0.4, 0.6, 30]
    assert (told[2]["mean_effect"], told[2]["strong_effect"], told[2]["n_strong"]) == (0.5, 0.2, 12)
    for unmeasured in (3, 4):
        assert (told[unmeasured]["mean_effect"], told[unmeasured]["n"]) == (0.5, 30)


def test_what_loses_to_its_null_is_not_reported_and_what_few_seeds_have_is_marked(told: dict[int, dict[str, Any]]) -> None:
    assert [row["reported"] for row in told.values()] == [True, False, True, True, False]
    marks = [["lexical"], ["lexical", "direction", "seeds"], ["strong", "seeds"], ["lexical"], ["lexical"]]
    assert [row["flags"] for row in told.values()] == marks


@pytest.fixture(scope="module")
def all_reported(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The small run with every concept reported, as of a random PM none is, measured again. SAEs of a random stream have
    little in common, so features count as counterparts from a low correlation on."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(done, folder)
    concepts = pl.read_parquet(folder / "concepts.parquet")
    no_flags = pl.Series("flags", [[]] * concepts.height, dtype=pl.List(pl.String))
    write_table(folder / "concepts.parquet", concepts.with_columns(pl.lit(True).alias("reported"), no_flags))
    forget_checksums(folder)
    run = Run.open(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmscope.ranking.counterparts.TOGETHER", 0.2)
        measure(run, silent, "again")
        yield run


def test_concepts_are_measured_on_prompts_that_ranked_nothing_in_every_dictionary(all_reported: Run) -> None:
    run, effects = all_reported, all_reported.measured_effects
    split = dict(run.scores.select("pair", "split").iter_rows())
    assert {split[pair] for pair in effects["pair"].unique()} == {"measure"}
    assert set(effects["kind"]) == {"own", "by_place", "by_token", "seed 1", "seed 2"}
    for site in run.sites:
        weights = [saes[site].W_dec for saes in (run.saes, *run.other_saes)]
        assert len(weights) == 3
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])


def test_the_measured_effect_is_the_joint_ablation_and_that_of_another_seed_its_counterparts(all_reported: Run) -> None:
    run, found = all_reported, counterparts_of(all_reported)
    members = members_of(run.ranked_concepts)
    checked, rows = 0, run.measured_effects.filter(pl.col("kind").is_in(["own", "seed 2"]))
    for concept, pair, side, kind, effect in rows.iter_rows():
        of, saes = (members[concept], run.saes) if kind == "own" else (found[1][concept], run.other_saes[1])
        if len(of) > 1 or checked > 20:
            continue
        ((site, features),) = of.items()
        tokens = run.tokens[run.ids.index(pair)]
        expected = ablate_naively(run.rm, saes[site], tokens.side(side), site, tokens.divergence, [features])
        assert effect == pytest.approx(float(expected), abs=2e-4)
        checked += abs(effect) > 1e-3
    assert checked > 5


def counterparts_of(run: Run) -> list[dict[int, Members]]:
    return counterparts(run.store, run.saes, run.other_saes, run.ranked_concepts)
