"""``edit`` on a small run: its figures are what the PM and the patched PM give; bad settings are one sentence each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from rmscope.activations.harvest import data_identity, harvest
from rmscope.cli.terminal import cell
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.readers import load_pairs
from rmscope.report.result import Rows
from rmscope.run.run import Run
from rmscope.settings import read_settings
from rmscope.statistics import Figure
from rmscope.studies.edit import analyse as study
from rmscope.studies.edit import check
from rmscope.studies.edit.analyse import analyse
from rmscope.studies.edit.patch import FeatureEdit, load_edited
from rmscope.studies.edit.result import BeforeAfter, ConceptMove, EditResult, GateResult, StyleCell
from rmscope.studies.edit.settings import EditConfig
from tests.model.small import PAIRS, small_model, small_sae, tokenizer

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a patch needs of a run: settings, scores, activations and an SAE."""
    root = tmp_path_factory.mktemp("edit")
    small_model("llama", max_position_embeddings=2048).save_pretrained(root / "pm")
    tokenizer().save_pretrained(root / "pm")
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.create(model=str(root / "pm"), data=str(root / "pairs.jsonl"), out=root / "run", sites=[SITE])
    run.on_disk.open(
        {"model": run.rm.identity, "data": data_identity(run.pairs)}, run.config.model_dump(mode="json"), run.sites
    )
    pl.DataFrame({"delta": run.rm.score(run.pairs).delta.numpy()}).write_parquet(root / "run" / "scores.parquet")
    small_sae().save(root / "run" / "saes" / SITE)
    harvest(run.rm, run.pairs, [SITE], root / "run" / "activations")
    return root / "run"


@pytest.fixture
def concepts(tmp_path: Path) -> str:
    path = tmp_path / "concepts.yaml"
    path.write_text("- name: paris\n  texts: ['It is Paris.', 'Paris it is.', 'Paris, on the Seine.']\n")
    return str(path)


def edit(folder: Path, **given: Any) -> EditResult:
    """Settings as the command line gives them: as texts."""
    return analyse(Run.open(folder), read_settings(EditConfig, None, given))


def test_before_and_after_are_what_the_pm_and_the_patched_pm_give(
    folder: Path, tmp_path: Path, concepts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "own_pairs", lambda run: {"few": run.pairs})  # the demo's are many, and long here
    monkeypatch.setattr(check, "TWINS", 12)
    out = tmp_path / "patch"
    result = edit(folder, out=out, site=SITE, features=["3,17", "40"], damp="0.5", concepts=concepts, check=True)
    assert result.edits == [FeatureEdit(SITE, (3, 17, 40), "damp", 0.5)]
    clean = load_pairs(folder.parent / "pairs.jsonl")
    rm = RewardModel.load(str(folder.parent / "pm"))
    before = rm.score(clean).delta
    after = load_edited(rm, out).score(clean).delta
    assert result.check is not None
    few = result.check.pairs["few"]
    assert few["before"]["accuracy"].value == pytest.approx(float((before > 0).float().mean()))
    assert few["edit"]["accuracy"].value == pytest.approx(float((after > 0).float().mean()))
    fall = float((before > 0).float().mean() - (after > 0).float().mean())
    assert few["edit"]["fall"].value == pytest.approx(fall, abs=1e-6)
    drift = float((after - before).abs().mean()) / result.check.sd
    assert few["edit"]["drift"].value == pytest.approx(drift, rel=1e-3)
    assert few["edit"]["correlation"].value == pytest.approx(float(torch.corrcoef(torch.stack([before, after]))[0, 1]))
    assert set(result.check.cues["paris"]) == {"before", "edit", "matched 1", "matched 2", "matched 3"}


def test_the_json_of_a_result_holds_every_figure(
    folder: Path, tmp_path: Path, concepts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "own_pairs", lambda _run: {})
    monkeypatch.setattr(check, "TWINS", 12)
    result = edit(folder, out=tmp_path / "patch", site=SITE, features="3", concepts=concepts, check=True)
    told = json.loads(json.dumps(result.as_json()))
    assert told["edits"] == [{"site": SITE, "features": [3], "operation": "suppress", "value": 0.0}]
    figures = told["check"]["cues"]["paris"]["edit"]
    assert set(figures) == {"ate", "gone"}
    assert set(figures["ate"]) == {"value", "low", "high", "n", "unit"}
    assert str(tmp_path / "patch") in result.summary()


def test_a_cue_of_ones_own_is_edited_by_rule(
    folder: Path, tmp_path: Path, concepts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TWINS", 12)
    result = edit(folder, cue=["paris"], concepts=concepts, out=tmp_path / "patch")
    (chosen,) = result.chosen
    assert (chosen.cue, chosen.site) == ("paris", SITE)
    assert 0 <= chosen.left <= chosen.loss < 1
    assert result.edits == [FeatureEdit(SITE, chosen.features, chosen.operation, chosen.value)]
    assert load_edited(str(folder.parent / "pm"), tmp_path / "patch").name.endswith("edited")


def test_clean_pairs_are_those_that_had_no_part_in_any_choice(folder: Path) -> None:
    run = Run.open(folder)
    own = check.own_pairs(run)
    assert [p.id for p in own["the run's measure split"]] == [run.ids[i] for i in run.of_split("measure")]
    on_demo = Run.create(run.config.model_copy(update={"data": "demo:planted"}))
    assert set(check.own_pairs(on_demo)) == {"demo pairs without cues"}
    assert all("plant" not in p.meta for p in own["demo pairs without cues"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to edit"),
        ({"site": "resid_post.2", "features": "1"}, "no SAE at resid_post.2"),
        ({"site": SITE, "features": "one"}, "features"),
        ({"site": SITE, "features": "1", "suppress": True, "clamp": "2"}, "one operation"),
        ({"site": SITE, "features": "96"}, "names the feature 96"),
        ({"cue": "none"}, "There is no cue none"),
        ({"cue": "thanks", "damp": "0"}, "by rule"),
        ({"site": SITE, "features": "1", "pairs": "x.jsonl"}, "--check"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    given: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        edit(folder, **given, out=tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_a_folder_of_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    given = {"site": SITE, "features": "1"}
    record = (folder / "run.yaml").read_bytes()
    for out in (tmp_path / "thesis", folder):
        with pytest.raises(InputError, match="not overwritten"):
            edit(folder, **given, out=out)
        with pytest.raises(InputError, match="not overwritten"):
            edit(folder, **given, out=tmp_path / "patch", export=out)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (folder / "run.yaml").read_bytes() == record
    assert not (tmp_path / "patch").exists()


def width(rows: Rows) -> int:
    """Columns that a table takes in the terminal when no cell is wrapped."""
    columns = [[name, *(cell(row[name]) for row in rows)] for name in rows[0]]
    return sum(max(map(len, column)) + 3 for column in columns) + 1


def test_tables_fit_80_columns() -> None:
    names = ("before", "edit", "mean difference", "matched 1")
    share, effect = Figure(0.6123, 0.5512, 0.6734, 42), Figure(-0.0352, -0.0821, 0.0131, 42)
    cue, accuracy = {"ate": effect, "gone": share}, {"accuracy": share, "fall": effect}
    both = accuracy | {"drift": effect, "correlation": effect}
    figures = BeforeAfter(
        sd=1.0,
        cues={"youre_right": dict.fromkeys(names, cue)},
        pairs={"the run's measure split": dict.fromkeys(names, both)},
        styles=[StyleCell("detailed markdown", "detailed markdown", 1292, dict.fromkeys(names, accuracy))],
    )
    move = ConceptMove("youre_right", 42, -0.017, -0.043, effect, 0.0001, 0.0006, True)
    gate = GateResult(base="a", new="b", bound=0.25, passed=False, moved=["youre_right"], concepts=[move], seconds=1.0)
    tables = [*figures.tables().values(), *gate.tables().values()]
    assert len(tables) == 7
    assert max(map(width, tables)) <= 80
