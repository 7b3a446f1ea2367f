"""``rmscope experiment`` and ``rmscope sufficiency``: the figures are the PM's own, bad usage is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import rmscope.cli  # noqa: F401  (registers the commands)
from rmscope.activations.harvest import data_identity, harvest
from rmscope.cli.base import app
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from tests.model.small import PAIRS, saved_pm, small_sae

SITE = "resid_post.1"
MINE = """
hypothesis: A second sentence lowers the reward.
prompts: ["Is it?", "Was it?", "Will it be?", "Has it been?"]
response: It is.
conditions: {plain: {same: true}, longer: {insert: [So it goes.]}}
baseline: plain
expects: {down: [longer]}
"""


@pytest.fixture(scope="module")
def pm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pm")
    saved_pm(folder)
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def run(pm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has activations and an SAE, and no ranking yet."""
    out = tmp_path_factory.mktemp("run") / "run"
    made = Run(RunConfig(model=str(pm), data=str(pm / "pairs.jsonl"), out=out, sites=[SITE]))
    made.on_disk.open({"model": made.rm.identity, "data": data_identity(made.pairs)}, made.config.model_dump(mode="json"))
    small_sae().save(out / "saes" / SITE)
    harvest(made.rm, made.pairs, [SITE], out / "activations")
    return out


def invoked(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return dict(json.loads(line))


def test_without_a_run_the_effects_are_differences_of_the_pms_own_rewards(pm: Path, tmp_path: Path) -> None:
    asked = ("experiment", str(pm / "mine.yaml"), "--model", str(pm), "--data", str(pm / "pairs.jsonl"))
    found = invoked(*asked, "--out", str(tmp_path))
    rm = RewardModel.load(str(pm))
    prompts = ["Is it?", "Was it?", "Will it be?", "Has it been?"]
    rewards = {
        answer: [rm.reward_alone(rm.text_ids([{"role": "user", "content": p}], answer)) for p in prompts]
        for answer in ("It is.", "It is. So it goes.")
    }
    effect = float(sum(rewards["It is. So it goes."]) - sum(rewards["It is."])) / 4
    (longer,) = (c for c in found["conditions"] if c["name"] == "longer")
    assert longer["effect"]["value"] == pytest.approx(effect, abs=1e-5)
    assert found["ablated"] is None
    assert pl.read_parquet(tmp_path / "mine.parquet").height == 8
    assert json.loads((tmp_path / "mine.json").read_text())["verdict"] == found["verdict"]
    assert "A second sentence lowers the reward." in (tmp_path / "mine.html").read_text()


def test_bad_usage_is_one_sentence_and_leaves_nothing(pm: Path, run: Path, tmp_path: Path) -> None:
    ablating = tmp_path / "ablating.yaml"
    ablating.write_text(MINE + "ablate: {site: resid_post.0, features: [1]}\n")
    mine, out = str(pm / "mine.yaml"), str(tmp_path / "out")
    for arguments, told in (
        (("experiment", mine), "nothing to measure on; name a run folder with --run, or a PM"),
        (("experiment", "weather", "--model", str(pm)), "weather is not there; name a YAML file, or one of dont_know"),
        (("experiment", str(ablating), "--run", str(run)), "no ranking at resid_post.1; rmscope report"),
        (("sufficiency", str(run)), "no ranking at resid_post.1; rmscope report"),
        (("sufficiency", str(run), "--site", "resid_post.9"), "no SAE at resid_post.9; it has resid_post.1"),
    ):
        with pytest.raises(InputError, match=told) as error:
            CliRunner().invoke(app, [*arguments, *(["--out", out] if arguments[0] == "experiment" else [])],
                               catch_exceptions=False)  # fmt: skip
        assert "\n" not in str(error.value)
        assert not Path(out).exists()
