"""``rmscope edit`` on a small run: what it says before and after is what the PMs give, and bad usage is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import rmscope.cli  # noqa: F401  (registers the commands)
from rmscope.activations.harvest import data_identity, harvest
from rmscope.cli.base import app
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.readers import load_pairs
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.studies.edit import check, choice
from rmscope.studies.edit.patch import load_edited
from tests.model.small import PAIRS, small_model, small_sae, tokenizer

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a patch needs of a run: settings, scores, activations and an SAE."""
    root = tmp_path_factory.mktemp("edit")
    small_model("llama", max_position_embeddings=2048).save_pretrained(root / "pm")
    tokenizer().save_pretrained(root / "pm")
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Run(RunConfig(model=str(root / "pm"), data=str(root / "pairs.jsonl"), out=root / "run", sites=[SITE]))
    made.on_disk.open({"model": made.rm.identity, "data": data_identity(made.pairs)}, made.config.model_dump(mode="json"))
    pl.DataFrame({"delta": made.rm.score(made.pairs).delta.numpy()}).write_parquet(root / "run" / "scores.parquet")
    small_sae().save(root / "run" / "saes" / SITE)
    harvest(made.rm, made.pairs, [SITE], root / "run" / "activations")
    return root / "run"


def edit(run: Path, *flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["edit", str(run), *flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return dict(json.loads(line))


def test_before_and_after_are_what_the_pm_and_the_patched_pm_give(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "own_pairs", lambda job: {"few": job.pairs})  # the demo's are many, and long here
    monkeypatch.setattr(check, "TWINS", 12)
    (tmp_path / "concepts.yaml").write_text(
        "- name: paris\n  texts: ['It is Paris.', 'Paris it is.', 'Paris, on the Seine.']\n"
    )
    named = ("--site", SITE, "--features", "3,17,40", "--damp", "0.5", "--concepts", str(tmp_path / "concepts.yaml"))
    made = edit(run, *named, "--out", str(tmp_path / "patch"), "--check")
    assert made["edits"] == [{"site": SITE, "operation": "damp", "value": 0.5, "features": [3, 17, 40]}]
    clean = load_pairs(run.parent / "pairs.jsonl")
    rm = RewardModel.load(str(run.parent / "pm"))
    before = rm.score(clean).delta
    after = load_edited(rm, tmp_path / "patch").score(clean).delta
    found = made["check"]["pairs"]["few"]
    assert found["before"]["accuracy"]["value"] == pytest.approx(float((before > 0).float().mean()))
    assert found["edit"]["accuracy"]["value"] == pytest.approx(float((after > 0).float().mean()))
    fall = float((before > 0).float().mean() - (after > 0).float().mean())
    assert found["edit"]["fall"]["value"] == pytest.approx(fall, abs=1e-6)
    sd = made["check"]["sd"]
    assert found["edit"]["drift"]["value"] == pytest.approx(float((after - before).abs().mean()) / sd, rel=1e-3)
    assert found["edit"]["correlation"]["value"] == pytest.approx(float(torch.corrcoef(torch.stack([before, after]))[0, 1]))
    assert set(made["check"]["cues"]["paris"]) == {"before", "edit", "matched 1", "matched 2", "matched 3"}


def test_a_cue_of_ones_own_is_edited_by_rule(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "TWINS", 12)
    (tmp_path / "concepts.yaml").write_text(
        "- name: paris\n  texts: ['It is Paris.', 'Paris it is.', 'Paris, on the Seine.']\n"
    )
    flags = ("--cue", "paris", "--concepts", str(tmp_path / "concepts.yaml"), "--out", str(tmp_path / "patch"))
    made = edit(run, *flags)
    (chosen,) = made["chosen"]
    assert (chosen["cue"], chosen["site"]) == ("paris", SITE)
    assert 0 <= chosen["left"] <= chosen["loss"] < 1
    assert load_edited(str(run.parent / "pm"), tmp_path / "patch").name.endswith("edited")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "nothing to edit"),
        (("--site", "resid_post.2", "--features", "1"), "no SAE at resid_post.2"),
        (("--site", SITE, "--features", "one"), "no list of features"),
        (("--site", SITE, "--features", "1", "--suppress", "--clamp", "2"), "One patch does one thing"),
        (("--site", SITE, "--features", "96"), "names the feature 96"),
        (("--cue", "none"), "There is no cue none"),
        (("--cue", "thanks", "--damp", "0"), "by rule"),
        (("--site", SITE, "--features", "1", "--pairs", "x.jsonl"), "--check"),
    ],
)
def test_bad_usage_is_one_sentence_and_writes_nothing(flags: tuple[str, ...], said: str, run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["edit", str(run), *flags, "--out", str(tmp_path / "patch")])
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert not (tmp_path / "patch").exists()
