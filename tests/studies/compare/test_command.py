"""``rmscope compare`` on a small run: what it compares with, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rmscope.cli  # noqa: F401  (registers the commands)
from rmscope.activations.harvest import data_identity, harvest
from rmscope.cli.base import app
from rmscope.errors import InputError
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
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
    made = Run(RunConfig(model=str(root / "pm"), data=str(root / "pairs.jsonl"), out=root / "run", sites=[SITE]))
    made.on_disk.open({"model": made.rm.identity, "data": data_identity(made.pairs)}, made.config.model_dump(mode="json"))
    small_sae().save(root / "run" / "saes" / SITE)
    harvest(made.rm, [made.pairs[i] for i in made.of_split("fit")], [SITE], root / "run" / "activations")
    ranked = pl.DataFrame({"feature": [*REPORTED, 5], "rank": [1, 2, 3, 4], "reported": [True, True, True, False]})
    (root / "run" / "features").mkdir()
    ranked.write_parquet(root / "run" / "features" / f"{SITE}.parquet")
    EditPatch((FeatureEdit(SITE, (17,)),), {SITE: small_sae()}, made.rm.identity, "pm").save(root / "patch")
    return root


def compared(root: Path, other: str, *flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["compare", str(root / "run"), other, *flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return dict(json.loads(line))


def test_a_run_is_compared_with_itself_on_its_measure_split(root: Path) -> None:
    found = compared(root, str(root / "run"), "--prompts", "8")
    run = Run(RunConfig(model=str(root / "pm"), data=str(root / "pairs.jsonl"), out=root / "run", sites=[SITE]))
    assert found["pairs"] == found["prompts"] == len(run.of_split("measure"))
    evidence = root / "run" / "evidence"
    table = pl.read_parquet(evidence / "compare-run.parquet")
    assert table.filter(pl.col("of") == "a")["feature"].to_list() == REPORTED
    assert all(d in (0, None) for d in table["difference"])
    assert table["found_again"].all()
    assert json.loads((evidence / "compare-run.json").read_text()) == found
    page = (evidence / "compare-run.html").read_text()
    assert "Are the features there in both?" in Page(page).text
    assert "http" not in page.replace("http-equiv", "")
    assert all(len(row["tokens"]) > 0 for row in found["features"])


def test_a_patch_is_read_as_the_mended_pm(root: Path, tmp_path: Path) -> None:
    found = compared(root, str(root / "patch"), "--prompts", "4", "--out", str(tmp_path))
    assert found["b"].endswith("edited")
    assert (tmp_path / "compare-patch.html").is_file()
    gone = next(row for row in found["features"] if row["feature"] == 17)
    assert gone["fire_b"] < gone["fire_a"]


def test_a_base_is_read_and_not_scored(root: Path, tmp_path: Path) -> None:
    found = compared(root, str(root / "base"), "--out", str(tmp_path))
    assert (found["base"], found["delta"], found["concepts"]) == (True, None, [])
    assert found["sites"][0]["a"] == found["sites"][0]["b"]  # this PM's stream is its base's
    assert found["sites"][0]["there"]["value"] == 1


def test_a_control_may_be_a_pm_or_a_run_and_not_a_base(root: Path, tmp_path: Path) -> None:
    for control in ("pm", "run"):
        found = compared(
            root, str(root / "patch"), "--prompts", "4", "--control", str(root / control), "--out", str(tmp_path)
        )
        assert found["control"]
        gone = next(row for row in found["features"] if row["feature"] == 17)
        assert gone["control"] == pytest.approx(gone["a"], abs=1e-6)
    assert "no scalar head" in refused(str(root / "run"), str(root / "pm"), "--control", str(root / "base"))
    assert "no scalar head" in refused(str(root / "run"), str(root / "base"), "--control", str(root / "pm"))


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert isinstance(done.exception, InputError)
    return str(done.exception)


def test_bad_usage_is_one_sentence(root: Path, tmp_path: Path) -> None:
    run = str(root / "run")
    assert "is no run folder" in refused(str(root / "pm"), run)
    assert "none" in refused(run, str(root / "none"))
    wide = saved(tmp_path / "wide", hidden_size=64)
    assert "stream of width 64" in refused(run, str(wide))
    other = saved(tmp_path / "other")
    mapped = json.loads((other / "tokenizer.json").read_text())
    mapped["model"]["merges"] = mapped["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(mapped))
    assert "its tokenizer is another one" in refused(run, str(other))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.yaml").write_text((root / "run" / "run.yaml").read_text())
    assert "has no ranking" in refused(str(tmp_path / "new"), run)
    assert "has no ranking" in refused(run, str(tmp_path / "new"))
