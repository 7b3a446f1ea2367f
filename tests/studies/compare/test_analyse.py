"""A comparison of a small run: with what it may be compared, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoModelForCausalLM

from rmscope.activations.harvest import data_identity, harvest
from rmscope.errors import InputError
from rmscope.run.run import Run
from rmscope.studies.compare.analyse import analyse
from rmscope.studies.compare.result import CompareResult, FeatureComparison
from rmscope.studies.compare.settings import CompareConfig
from rmscope.studies.edit.patch import EditPatch, FeatureEdit
from tests.model.small import small_model, small_sae, tokenizer
from tests.report.test_page import Page
from tests.studies.compare.test_compare import SITE, TEXTS

REPORTED = [2, 17, 40]


def saved(folder: Path, **changes: Any) -> Path:
    small_model("llama", max_position_embeddings=1024, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PM, its base, pairs, and what a comparison needs of a run of it: activations, an SAE, a ranking."""
    root = tmp_path_factory.mktemp("compare")
    model = small_model("llama", max_position_embeddings=1024)
    base = AutoModelForCausalLM.from_config(model.config)
    base.model.load_state_dict(model.model.state_dict())
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    saved(root / "pm")
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in TEXTS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Run.create(model=str(root / "pm"), data=str(root / "pairs.jsonl"), out=root / "run", sites=[SITE])
    made.on_disk.open(
        {"model": made.rm.identity, "data": data_identity(made.pairs)}, made.config.model_dump(mode="json"), made.sites
    )
    small_sae().save(root / "run" / "saes" / SITE)
    harvest(made.rm, [made.pairs[i] for i in made.of_split("fit")], [SITE], root / "run" / "activations")
    ranked = pl.DataFrame({"feature": [*REPORTED, 5], "rank": [1, 2, 3, 4], "reported": [True, True, True, False]})
    (root / "run" / "features").mkdir()
    ranked.write_parquet(root / "run" / "features" / f"{SITE}.parquet")
    EditPatch((FeatureEdit(SITE, (17,)),), {SITE: small_sae()}, made.rm.identity, "pm").save(root / "patch")
    return root


def compared(root: Path, other: str, **settings: Any) -> CompareResult:
    return analyse(Run.open(root / "run"), CompareConfig(other=str(root / other), **settings))


def feature(result: CompareResult, number: int) -> FeatureComparison:
    return next(f for f in result.features if f.feature == number)


def test_a_run_is_compared_with_itself_on_its_measure_split(root: Path) -> None:
    result = compared(root, "run", prompts=8)
    run = Run.open(root / "run")
    assert result.pairs == result.prompts == len(run.of_split("measure"))
    evidence = root / "run" / "evidence"
    table = pl.read_parquet(evidence / "compare-run.parquet")
    assert table.filter(pl.col("of") == "a")["feature"].to_list() == REPORTED
    assert all(d in (0, None) for d in table["difference"])
    assert table["found_again"].all()
    assert json.loads((evidence / "compare-run.json").read_text()) == result.as_json()
    page = (evidence / "compare-run.html").read_text()
    assert page == result.page().html
    assert result.page().path == evidence / "compare-run.html"
    assert "Are the features there in both?" in Page(page).text
    assert "http" not in page.replace("http-equiv", "")
    assert all(len(f.tokens) > 0 for f in result.features)


def test_a_run_that_is_open_already_gives_the_same(root: Path, tmp_path: Path) -> None:
    by_name = compared(root, "run", prompts=4, out=tmp_path / "a")
    config = CompareConfig(other=str(root / "run"), prompts=4, out=tmp_path / "b")
    opened = analyse(Run.open(root / "run"), config, Run.open(root / "run"))
    assert opened.model_copy(update={"seconds": by_name.seconds}).as_json() == by_name.as_json()
    assert opened.table.equals(by_name.table)


def test_a_patch_is_read_as_the_mended_pm(root: Path, tmp_path: Path) -> None:
    result = compared(root, "patch", prompts=4, out=tmp_path)
    assert result.b.endswith("edited")
    assert (tmp_path / "compare-patch.html").is_file()
    assert feature(result, 17).fire_b < feature(result, 17).fire_a


def test_a_base_is_read_and_not_scored(root: Path, tmp_path: Path) -> None:
    result = compared(root, "base", out=tmp_path)
    assert (result.base, result.delta, result.concepts) == (True, None, [])
    assert result.sites[0].a == result.sites[0].b  # this PM's stream is its base's
    assert result.sites[0].there.value == 1


def test_a_control_may_be_a_pm_or_a_run_and_not_a_base(root: Path, tmp_path: Path) -> None:
    for control in ("pm", "run"):
        result = compared(root, "patch", prompts=4, control=[str(root / control)], out=tmp_path)
        assert len(result.controls) == 1
        gone = feature(result, 17)
        assert gone.control is not None
        assert gone.a is not None
        assert gone.control.value == pytest.approx(gone.a.value, abs=1e-6)
    assert len(compared(root, "patch", prompts=4, control=f"{root / 'pm'},{root / 'run'}", out=tmp_path).controls) == 2
    for other, control in (("pm", "base"), ("base", "pm")):
        with pytest.raises(InputError, match="no scalar head"):
            compared(root, other, control=[str(root / control)])


def test_what_cannot_be_compared_is_one_sentence(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        compared(root, "none")
    wide = saved(tmp_path / "wide", hidden_size=64)
    with pytest.raises(InputError, match="stream of width 64"):
        compared(root, str(wide))
    other = saved(tmp_path / "other")
    mapped = json.loads((other / "tokenizer.json").read_text())
    mapped["model"]["merges"] = mapped["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(mapped))
    with pytest.raises(InputError, match="its tokenizer is another one"):
        compared(root, str(other))


def test_a_run_that_is_not_finished_is_refused_on_either_side(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text((root / "run" / "run.yaml").read_text())
    with pytest.raises(InputError, match="is not finished"):
        compared(root, str(tmp_path))
    with pytest.raises(InputError, match="is not finished"):
        analyse(Run.open(tmp_path), CompareConfig(other=str(root / "run")))
