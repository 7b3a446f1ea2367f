"""``rs.jailbreak`` on a small run: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.model.capabilities import Capabilities
from rmscope.model.reward_model import RewardModel
from rmscope.run.run import Run
from rmscope.sae import SaeConfig
from rmscope.studies.jailbreak import analyse as study
from rmscope.studies.jailbreak import inputs, search
from rmscope.studies.jailbreak.result import JailbreakResult
from rmscope.studies.jailbreak.settings import JailbreakConfig
from tests.model.small import SENTENCES, saved_pm
from tests.run.small import forget_checksums

SITE = "resid_post.1"
PARTS = [s for sentence in SENTENCES for s in sentence.split(", ")]


def write_pairs(path: Path, question: str, n: int = 72) -> str:
    rows = [
        {
            "prompt": f"{question} {i}?",
            "chosen": f"{PARTS[i % 9]}. {PARTS[i % 4]}.",
            "rejected": f"{PARTS[(i + 1) % 9]} {i}.",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 72 pairs whose features all count as reported: which ones they are is random, the way through is not."""
    folder = tmp_path_factory.mktemp("run")
    saved_pm(folder / "pm")
    run = Run.create(
        model=str(folder / "pm"), data=write_pairs(folder / "pairs.jsonl", "Is it"), out=folder / "out", sites=[SITE],
        sae=SaeConfig(d_sae=64, k=6, tokens=4096, batch_size=512), screen=12, others=20, responses=8, quality_responses=2,
        frozen=12, confirm_prompts=4, ledger_pairs=1, device="cpu",
    ).go()  # fmt: skip
    no_flags = pl.Series("flags", [[]] * run.features(SITE).height, dtype=pl.List(pl.String))
    table = run.features(SITE).with_columns(pl.lit(True).alias("reported"), no_flags)
    table.write_parquet(run.folder / "features" / f"{SITE}.parquet")
    forget_checksums(run.folder)
    return run.folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (study, "SEARCH_PROMPTS", 4), (study, "OWN_LISTS", 1), (inputs, "NO_EFFECT", 9.0), (search, "PHRASES", 4),
        (search, "FEATURES_PER_SITE", 3), (search, "POOL", 4), (search, "FLIPS", 4), (search, "FLIPS_CHECKED", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def jailbreak(folder: Path, **settings: Any) -> JailbreakResult:
    return study.analyse(Run.open(folder), JailbreakConfig(**{"budget": 16, "prompts": 4, **settings}))


@pytest.mark.usefixtures("small")
def test_it_writes_its_table_summary_and_page_and_gives_the_same_again(folder: Path) -> None:
    result = jailbreak(folder)
    table, stored, page = (folder / "evidence" / f"jailbreak.{kind}" for kind in ("parquet", "json", "html"))
    first = table.read_bytes()
    assert pl.read_parquet(table).equals(result.table)
    assert json.loads(stored.read_text("utf-8")) == json.loads(json.dumps(result.model_dump(mode="json")))
    assert page.read_text("utf-8") == result.page().html
    assert page == result.page().path
    assert {"features", "blind", "without effect", "shuffled", "no phrase"} <= {arm.arm for arm in result.arms}
    bare = result.table.filter(pl.col("arm") == "no phrase")
    assert bare["outranks"].sum() == 0  # bad text never outranks the chosen answer as it is
    assert not (folder / ".parts").exists()
    searched = (folder / "evidence" / "jailbreak.made.json").stat().st_mtime_ns
    jailbreak(folder)
    assert (folder / "evidence" / "jailbreak.made.json").stat().st_mtime_ns == searched  # the search is not done again
    assert table.read_bytes() == first


@pytest.mark.usefixtures("small")
def test_a_killed_measurement_resumes_at_the_unit_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jailbreak(folder, seed=1)
    monkeypatch.setattr("rmscope.run.folder.units", lambda n: [range(i, min(i + 2, n)) for i in range(0, n, 2)])
    done: list[int] = []
    measure_lists = study.measure_lists

    def killed(*given: Any) -> pl.DataFrame:
        if done:
            raise KeyboardInterrupt
        done.append(len(given[2]))
        return measure_lists(*given)

    monkeypatch.setattr(study, "measure_lists", killed)
    with pytest.raises(KeyboardInterrupt):
        jailbreak(folder, seed=1)
    monkeypatch.setattr(study, "measure_lists", lambda *given: done.append(len(given[2])) or measure_lists(*given))
    assert jailbreak(folder, seed=1).table.equals(whole.table)
    assert done == [2, 2]


@pytest.mark.usefixtures("small")
def test_fresh_pairs_are_measured_and_pairs_of_the_run_among_them_are_counted(folder: Path) -> None:
    mixed = folder.parent / "mixed.jsonl"
    write_pairs(mixed, "Was it", 12)
    mixed.write_text(mixed.read_text() + (folder.parent / "pairs.jsonl").read_text())
    result = jailbreak(folder, data=str(mixed))
    assert all(key.startswith("Was it") for key in result.table["key"])
    assert result.left_out["pairs with a prompt of the run"] == 72
    assert result.data == str(mixed)


@pytest.mark.usefixtures("small")
def test_the_pairs_of_the_run_are_not_measured_on_again(folder: Path) -> None:
    with pytest.raises(InputError, match=r"All 72 pairs of .* have prompts of the run in .*; give pairs with other prompts"):
        jailbreak(folder, data=str(folder.parent / "pairs.jsonl"))


@pytest.mark.usefixtures("small")
def test_too_few_prompts_are_told_with_their_number(folder: Path) -> None:
    with pytest.raises(InputError, match=r"Only [0-3] prompts have a bad text below their chosen answer, 4 are needed"):
        jailbreak(folder, prompts=3)


def test_what_cannot_be_done_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"has no SAE at resid_post\.3; it has resid_post\.1"):
        jailbreak(folder, site="resid_post.3")
    with pytest.raises(InputError, match="is no run folder"):
        jailbreak(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "capabilities", Capabilities(packing=True, resume=False, ragged=False))
        with pytest.raises(InputError, match="cannot be resumed at a site, which this search and its ablations need"):
            jailbreak(folder)
    path = folder / "features" / f"{SITE}.parquet"
    table = pl.read_parquet(path)
    try:
        table.with_columns(pl.lit(False).alias("reported")).write_parquet(path)
        with pytest.raises(InputError, match="nothing to make a jailbreak of"):
            jailbreak(folder)
    finally:
        table.write_parquet(path)
