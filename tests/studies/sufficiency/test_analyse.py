"""The sufficiency study on a run: what it writes, site by site, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.run.run import Run
from rmscope.studies.sufficiency.analyse import analyse
from rmscope.studies.sufficiency.result import SufficiencyResult
from rmscope.studies.sufficiency.settings import SufficiencyConfig
from tests.studies.experiment.small import FEATURES, SITES, small_run, write_ranking


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(tmp_path_factory.mktemp("run"))
    for site in SITES:
        write_ranking(run, site)
    return run


@pytest.fixture(scope="module")
def result(run: Run) -> SufficiencyResult:
    return analyse(run, SufficiencyConfig(prompts=8))


def test_every_reported_feature_of_every_site_is_classified_on_fresh_prompts(run: Run, result: SufficiencyResult) -> None:
    fresh = {run.pairs[i].prompt_key for i in run.of_split("measure")}
    assert [site.site for site in result.sites] == SITES
    for site in result.sites:
        assert [row.feature for row in site.features] == list(range(FEATURES))
        assert sum(count.features for count in site.counts) == FEATURES
        assert [row.tokens for row in site.features] == [run.top_tokens(site.site, j) for j in range(FEATURES)]
        assert set(site.contexts["prompt"]) <= fresh
        assert 0 < site.contexts["text"].count() <= site.contexts.height
        assert sum(count.flagged for count in site.counts) == 1
        assert site.sd == run.sd
    assert result.agreement is not None
    assert result.agreement.features == sum(site.agreement.features for site in result.sites)


def test_the_folder_holds_what_the_result_holds(run: Run, result: SufficiencyResult) -> None:
    folder = run.folder / "evidence" / "sufficiency"
    for site in result.sites:
        assert json.loads((folder / f"{site.site}.json").read_text()) == json.loads(json.dumps(site.as_json()))
        assert (folder / f"{site.site}.html").read_text() == site.page().html
        assert pl.read_parquet(folder / f"{site.site}.features.parquet").equals(site.table)
        assert pl.read_parquet(folder / f"{site.site}.contexts.parquet").equals(site.contexts)
    stored = json.loads((folder / "agreement.json").read_text())
    assert stored == json.loads(json.dumps(result.as_json()))["agreement"]
    names = [f"{site}.{end}" for site in SITES for end in ("json", "html", "features.parquet", "contexts.parquet")]
    assert {p.name for p in folder.iterdir()} == {"agreement.json", *names}


def test_the_page_escapes_and_shows_every_feature(result: SufficiencyResult) -> None:
    page = result.sites[0].model_copy(update={"model": "<i>pm</i>"}).page().html
    assert "<i>pm</i>" not in page
    assert "&lt;i&gt;pm&lt;/i&gt;" in page
    assert "Does text agree?" in page
    assert all(f'id="f-{j}"' in page for j in range(FEATURES))


def test_the_terminal_shows_every_kind_of_every_site(result: SufficiencyResult) -> None:
    tables = result.tables()
    for site in SITES:
        rows = tables[f"{FEATURES} reported features at {site}"]
        assert sum(row["features"] for row in rows) == FEATURES
        assert site in result.summary()


@pytest.mark.slow
def test_one_site_is_studied_alone_and_one_without_reported_features_left_out(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    write_ranking(run, SITES[0], reported=2)
    write_ranking(run, SITES[1], reported=0)
    result = analyse(run, SufficiencyConfig(prompts=8))
    assert [(site.site, len(site.features)) for site in result.sites] == [(SITES[0], 2)]
    assert result.agreement is None
    assert not (run.folder / "evidence" / "sufficiency" / "agreement.json").exists()
    with pytest.raises(InputError, match=r"reports no feature at resid_post\.2; rank more"):
        analyse(run, SufficiencyConfig(site=SITES[1]))


def test_what_cannot_be_studied_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path, SITES[:1])
    for site, told in (
        ("resid_post.9", r"no SAE at resid_post\.9; it has resid_post\.1"),
        (None, r"not finished \(resid_post\.1\.parquet is missing\)"),
    ):
        with pytest.raises(InputError, match=told) as error:
            analyse(run, SufficiencyConfig(site=site))
        assert "\n" not in str(error.value)
    write_ranking(run, SITES[0])
    monkeypatch.setattr(run.rm, "capabilities", SimpleNamespace(resume=False))
    with pytest.raises(InputError, match="cannot be resumed at a site, which steering needs"):
        analyse(run, SufficiencyConfig())
    assert not (run.folder / "evidence").exists()
