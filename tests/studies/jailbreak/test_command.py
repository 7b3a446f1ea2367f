"""``rmscope jailbreak`` on a small run: what it writes, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rmscope.cli.jailbreak import jailbreak
from rmscope.errors import InputError
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.sae import SaeConfig
from rmscope.studies.jailbreak import analyse, search
from tests.model.small import SENTENCES, saved_pm

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 72 pairs whose features all count as reported: what they are is random, the way through is not."""
    folder = tmp_path_factory.mktemp("run")
    saved_pm(folder / "pm")
    parts = [s for sentence in SENTENCES for s in sentence.split(", ")]
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"{parts[i % 9]}. {parts[i % 4]}.", "rejected": f"{parts[(i + 1) % 9]} {i}."}
        for i in range(72)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        model=str(folder / "pm"), data=str(folder / "pairs.jsonl"), out=folder / "out", sites=[SITE],
        sae=SaeConfig(d_sae=64, k=6, tokens=4096, batch_size=512), screen=12, others=20, responses=8, quality_responses=2,
        frozen=12, confirm_prompts=4, ledger_pairs=1,
    )  # fmt: skip
    Run(config).go()
    table = pl.read_parquet(folder / "out" / "features" / f"{SITE}.parquet")
    no_flags = pl.Series("flags", [[]] * table.height, dtype=pl.List(pl.String))
    table.with_columns(pl.lit(True).alias("reported"), no_flags).write_parquet(
        folder / "out" / "features" / f"{SITE}.parquet"
    )
    return folder / "out"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (analyse, "SEARCHED", 4), (analyse, "PHRASES", 4), (analyse, "OWN", 1), (analyse, "FEATURES", 3),
        (analyse, "WITHOUT", 9.0),
        (search, "POOL", 4), (search, "FLIPS", 4), (search, "CHECKED", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def command(run: Path, **changes: Any) -> None:
    given: dict[str, Any] = {"site": None, "budget": 16, "prompts": 4, "data": None, "on_bad_row": "error", "seed": 0}
    jailbreak(run, **{**given, **changes}, as_json=True, debug=False)


@pytest.mark.usefixtures("small")
def test_it_writes_its_table_summary_and_page_and_gives_the_same_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run)
    printed = json.loads(capsys.readouterr().out)
    table, page = (run / "evidence" / f"jailbreak.{kind}" for kind in ("parquet", "html"))
    first, summary = table.read_bytes(), json.loads((run / "evidence" / "jailbreak.json").read_text())
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert printed["arms"] == summary["arms"]
    assert {"features", "blind", "without effect", "shuffled", "no phrase"} <= {arm["arm"] for arm in summary["arms"]}
    bare = pl.read_parquet(table).filter(pl.col("arm") == "no phrase")
    assert bare["outranks"].sum() == 0  # bad text never outranks the chosen answer as it is
    assert not (run / ".parts").exists()
    made = (run / "evidence" / "jailbreak.made.json").stat().st_mtime_ns
    command(run)
    assert (run / "evidence" / "jailbreak.made.json").stat().st_mtime_ns == made  # the search is not done again
    assert table.read_bytes() == first


@pytest.mark.usefixtures("small")
def test_prompts_that_stand_in_the_run_are_not_measured_on(run: Path) -> None:
    with pytest.raises(InputError, match="its prompt stands in the run: "):
        command(run, data=str(run.parent / "pairs.jsonl"))


def test_what_cannot_be_done_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no SAE at resid_post\.3; it has resid_post\.1"):
        command(run, site="resid_post.3")
    with pytest.raises(InputError, match="is no run folder"):
        command(tmp_path)
    table = pl.read_parquet(run / "features" / f"{SITE}.parquet")
    try:
        table.with_columns(pl.lit(False).alias("reported")).write_parquet(run / "features" / f"{SITE}.parquet")
        with pytest.raises(InputError, match="nothing to make a jailbreak of"):
            command(run)
    finally:
        table.write_parquet(run / "features" / f"{SITE}.parquet")
