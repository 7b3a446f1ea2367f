"""SAEs side by side: brought ones and those of a run, what is written, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.evaluation.reconstruction import as_table, evaluate
from rmscope.run.run import Run
from rmscope.studies.evaluate.analyse import analyse
from rmscope.studies.evaluate.result import EvaluateResult, short_names
from rmscope.studies.evaluate.settings import EvaluateConfig
from tests.evaluation.test_reconstruction import FIGURES
from tests.model.small import small_sae
from tests.studies.experiment.small import SITES, saved_inputs, small_run, write_ranking


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(tmp_path_factory.mktemp("evaluate"))
    for site in SITES:
        write_ranking(run, site)
    return run


@pytest.fixture(scope="module")
def of_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    """The run's SAEs with their curves, and a brought SAE beside them."""
    other = saved_sae(tmp_path_factory.mktemp("brought") / "a<b", "resid_post.0")
    out = tmp_path_factory.mktemp("out")
    return analyse(EvaluateConfig(run=run.folder, sae=[str(other)], curves=True, out=out))


def saved_sae(folder: Path, site: str, seed: int = 0, **shape: int) -> Path:
    sae = small_sae(seed=seed, **shape)
    sae.site = site
    sae.save(folder)
    return folder


def test_a_folder_of_saes_stands_for_those_in_it(tmp_path: Path) -> None:
    pm, data = saved_inputs(tmp_path)
    for i, site in enumerate(("resid_post.0", "resid_post.2")):
        saved_sae(tmp_path / "saes" / site, site, seed=i)
    result = analyse(EvaluateConfig(model=pm, data=data, sae=[str(tmp_path / "saes")], limit=6, out=tmp_path / "out"))
    assert [s.site for s in result.saes] == ["resid_post.0", "resid_post.2"]
    assert (result.pairs, result.prompts) == (6, 6)
    rows = json.loads(json.dumps(result.as_json()))
    assert [row["sae"] for row in rows] == [str(tmp_path / "saes" / s.site) for s in result.saes]
    assert all(row["fvu_low"] <= row["fvu"] <= row["fvu_high"] for row in rows)
    assert pl.read_parquet(tmp_path / "out" / "evaluation.parquet").equals(result.table)
    assert result.page() is not None
    assert (tmp_path / "out" / "evaluation.html").read_text() == result.show().html


def test_a_runs_saes_are_evaluated_on_one_pair_per_prompt_of_its_measure_split(run: Run, of_run: EvaluateResult) -> None:
    places = run.pair_set.one_per_prompt(run.of_split("measure"), 128)
    prompts = [run.pairs[i].prompt_key for i in places]
    expected = as_table(evaluate(run.rm, dict(run.saes), [run.tokens[i] for i in places], prompts))
    assert of_run.table.filter(pl.col("sae").is_in(SITES)).equals(expected)
    assert of_run.pairs == len(places) == of_run.prompts
    assert [Path(s.name).name for s in of_run.saes] == [*SITES, "a<b"]
    again = analyse(EvaluateConfig(limit=2), run=run)
    assert (again.pairs, again.page()) == (2, None)  # without a folder nothing is written


def test_every_figure_is_in_the_tables_for_the_terminal(of_run: EvaluateResult) -> None:
    shown = [row for rows in of_run.tables().values() for row in rows if row["SAE"] == SITES[0]]
    assert sum(len(row) - 1 for row in shown) == len(FIGURES) + len(("site", "family", "features", "dead"))
    assert all(site in of_run.summary() for site in SITES)


def test_short_names_tell_saes_apart() -> None:
    assert short_names(["resid_post.1", "/x/resid_post.2"]) == ["resid_post.1", "resid_post.2"]
    assert short_names(["/x/run/saes/a", "/x/run2/saes/a"]) == ["run", "run2"]
    assert short_names(["/x/k8/a", "/x/k8/b", "/x/k16/a"]) == ["k8/a", "k8/b", "k16/a"]
    assert short_names(["a", "/x/a"]) == ["a", "/x/a"]
    assert short_names(["/x/a", "/x/a/a"]) == ["a", "a/a"]


def test_curves_are_stored_in_the_run_for_its_report(run: Run, of_run: EvaluateResult) -> None:
    assert [e.site for e in of_run.explained] == SITES
    for explained, sae in zip(of_run.explained, of_run.saes, strict=False):
        stored = json.loads((run.folder / "effects" / explained.site / "explained.json").read_text())
        assert stored == json.loads(json.dumps(explained.as_dict()))
        assert stored["pairs"] == of_run.pairs
        assert stored["evaluation"]["delta_r2"]["value"] == pytest.approx(sae.figures["delta_r2"].value, abs=1e-6)
    assert str(run.folder) in of_run.summary()


def test_the_page_shows_every_sae_and_asks_for_nothing(of_run: EvaluateResult) -> None:
    page = of_run.show().html
    assert "3 SAEs side by side" in page
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert page.count("<svg") == 2 * 3
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_what_is_missing_is_told(run: Run, tmp_path: Path) -> None:
    pm, data = saved_inputs(tmp_path)
    with pytest.raises(InputError, match="--model and --data"):
        analyse(EvaluateConfig(sae=[str(tmp_path)]))
    with pytest.raises(InputError, match="Curves need a run folder"):
        analyse(EvaluateConfig(model=pm, data=data, curves=True))
    with pytest.raises(InputError, match="no SAE to evaluate"):
        analyse(EvaluateConfig(model=pm, data=data))
    with pytest.raises(InputError, match="is no run folder"):
        analyse(EvaluateConfig(run=tmp_path))


def test_an_sae_needs_a_site_of_the_pm_and_its_width(run: Run, tmp_path: Path) -> None:
    wide = saved_sae(tmp_path / "wide", "resid_post.0", d=48)
    with pytest.raises(InputError, match="reads 48 dimensions"):
        analyse(EvaluateConfig(sae=[str(wide)]), run=run)
    deep = saved_sae(tmp_path / "deep", "resid_post.99")
    with pytest.raises(InputError, match="99"):
        analyse(EvaluateConfig(sae=[str(deep)]), run=run)
    nowhere = saved_sae(tmp_path / "nowhere", "")
    with pytest.raises(InputError, match="pass --site"):
        analyse(EvaluateConfig(sae=[str(nowhere)]), run=run)
    named = analyse(EvaluateConfig(sae=[str(nowhere)], site="resid_post.0", limit=2), run=run)
    assert named.saes[-1].site == "resid_post.0"
