"""What settings change in a finished run: reward-aware SAEs, ledgers or none, more confirm pairs; and back again."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rmscope.cli.step_settings import LedgerConfig
from rmscope.cli.steps import ledger
from rmscope.cli.summaries import RunSummary
from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.pairs.readers import load_pairs
from rmscope.run import train
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.run.train import train_run_saes
from rmscope.sae import Sae
from rmscope.settings import read_settings
from tests.run.small import settings, tables


@pytest.mark.slow
def test_reward_aware_saes_stand_where_the_plain_ones_did_and_back(done: Path, pm: str, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    Run.create(settings(pm, out, reward_aware=3)).go()
    for site in sorted(p.name for p in (done / "features").iterdir()):
        plain, tuned = (Sae.load(out / "saes" / part / Path(site).stem) for part in ("plain", ""))
        assert plain.identity() == Sae.load(done / "saes" / Path(site).stem).identity()
        assert tuned.metadata["rmscope"]["reward_aware"]["steps"] == 3
        assert tuned.identity() != plain.identity()
        effects = (Path("effects") / Path(site).stem / "exact.parquet" for _ in range(2))
        assert not pl.read_parquet(out / next(effects)).equals(pl.read_parquet(done / next(effects)))
    Run.create(settings(pm, out)).go()
    assert {k: v for k, v in tables(out).items() if "plain" not in k and "aware" not in k} == tables(done)


def test_reward_aware_saes_are_those_of_the_runs_own_rewards(
    done: Path, pm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the run hands over (its plain SAEs, its fit pairs, their scores from disk) is what scoring them anew gives."""
    # in bfloat16 the last bit of a score on disk comes to a hundredth of what the steps move
    monkeypatch.setattr("rmscope.evaluation.reward_aware.fast_products", lambda _device, _wanted: nullcontext())
    run = Run.create(settings(pm, shutil.copytree(done, tmp_path / "run"), reward_aware=5))
    found = train_run_saes(run, run.config.sae, tmp_path / "run" / "saes")
    pairs = [run.pairs[i] for i in run.of_split("fit")]
    for site, sae in found.items():
        plain = Sae.load(done / "saes" / site)
        by_hand = fine_tune(run.rm, plain, pairs, RewardAwareConfig(steps=5, seed=run.config.sae.seed), run.config.sae)
        far = float((by_hand.W_dec - plain.W_dec).abs().max())
        assert far > 1e-4
        assert float((sae.W_dec - by_hand.W_dec).abs().max()) < 0.001 * far
        swapped = run.rm.score_tokens(run.rm.tokenize_all(pairs[::-1]))
        other = fine_tune(run.rm, plain, pairs, RewardAwareConfig(steps=5), run.config.sae, scores=swapped)
        assert float((other.W_dec - by_hand.W_dec).abs().max()) > 0.1 * far  # scores of other pairs would show


def test_fine_tuning_that_was_killed_leaves_no_mixture(
    done: Path, pm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, calls = shutil.copytree(done, tmp_path / "run"), []

    def killed(*given: Any) -> Sae:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fine_tune(*given)

    monkeypatch.setattr(train, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        Run.create(settings(pm, out, reward_aware=2)).go()
    Run.create(settings(pm, out)).go()
    assert {k: v for k, v in tables(out).items() if "plain" not in k and "aware" not in k} == tables(done)


def test_fine_tuning_needs_saes_of_its_own_and_float32(pm: str, tmp_path: Path) -> None:
    for changes, told in (({"sae_dir": "saes"}, "leave one of them out"), ({"dtype": "bfloat16"}, "float32, not bfloat16")):
        with pytest.raises(InputError, match=told):
            read_settings(
                RunConfig, None, {"model": pm, "data": "demo:planted", "out": tmp_path, "reward_aware": 3, **changes}
            )


def test_a_run_without_ledgers_says_so_and_goes_on_to_them(done: Path, pm: str, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    page = (out / "report.html").read_text()
    assert "the ledger of 8 pairs" in page
    assert "not measured: too few" not in page
    run = Run.create(settings(pm, out, ledger_pairs=0)).go()
    assert [site.ledger for site in run.evidence.sites] == [None] * len(run.sites)
    page = (out / "report.html").read_text()
    assert "the ledger of" not in page
    assert "not measured: too few pairs have a ledger" in page
    assert {row["Δr = features"] for row in RunSummary.of(run).tables()["sites"]} == {""}
    with pytest.raises(InputError, match="has no ledgers"):
        ledger(run, LedgerConfig(site=run.sites[0]))
    again = Run.create(settings(pm, out)).go()
    assert all(row["Δr = features"].endswith("%") for row in RunSummary.of(again).tables()["sites"])
    assert tables(out) == tables(done)


def test_ledgers_of_too_few_pairs_give_no_shares(done: Path, pm: str, tmp_path: Path) -> None:
    run = Run.create(settings(pm, shutil.copytree(done, tmp_path / "run"), ledger_pairs=3)).go()
    site = run.sites[0]
    assert run.evidence.sites[0].ledger is None
    with pytest.raises(InputError, match="Ledgers of 3 pairs"):
        ledger(run, LedgerConfig(site=site))
    pair = run.ledger(site)["pair"][0]
    found = ledger(run, LedgerConfig(site=site, pair=pair))
    assert found.ledger["pair"] == pair
    assert {row["side"] for row in found.features} == {"chosen", "rejected"}


def test_more_pairs_of_a_confirm_prompt_join_the_first_one_and_its_prompt_counts_once(
    done: Path, pm: str, tmp_path: Path
) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    Run.create(settings(pm, out, confirm_pairs=2)).go()
    for one in sorted((done / "effects").iterdir()):
        pairs = [confirm_pairs_of(folder, one.name, pm) for folder in (done, out)]
        assert pairs[0]["n"].max() == 1
        assert pairs[1]["n"].max() == 2
        assert pairs[0].join(pairs[1], on=["feature", "prompt"], how="anti").height == 0
        ranked = [pl.read_parquet(f / "features" / f"{one.name}.parquet").sort("feature") for f in (done, out)]
        assert ranked[0]["n"].equals(ranked[1]["n"])
        assert not ranked[0]["mean_effect"].equals(ranked[1]["mean_effect"])


def confirm_pairs_of(folder: Path, site: str, pm: str) -> pl.DataFrame:
    """(feature, prompt, n): on how many pairs of each confirm prompt a feature was ablated."""
    prompts = {p.id: p.first_human_turn() for p in load_pairs(Path(pm) / "pairs.jsonl")}
    confirm = pl.read_parquet(folder / "scores.parquet").filter(pl.col("split") == "confirm").select("pair")
    exact = pl.read_parquet(folder / "effects" / site / "exact.parquet").join(confirm, on="pair", how="semi")
    prompt = pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt")
    return exact.with_columns(prompt).group_by("feature", "prompt").agg(pl.col("pair").n_unique().alias("n"))
