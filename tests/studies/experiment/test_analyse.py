"""The experiment study on a run, and on a PM without one: what it measures, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.run.run import Run
from rmscope.studies.experiment.analyse import analyse
from rmscope.studies.experiment.settings import ExperimentConfig
from tests.studies.experiment.small import FEATURES, SITES, saved_inputs, small_run, write_ranking

OWN = """
hypothesis: A second sentence lowers the reward.
prompts: ["Is it?", "Was it?", "Will it be?", "Has it been?"]
response: It is.
conditions: {plain: {same: true}, longer: {insert: [So it goes.]}}
baseline: plain
expects: {down: [longer]}
"""
ON_DATA = """
hypothesis: A second sentence moves the reward.
prompts: data
conditions: {plain: {same: true}, longer: {insert: [So it goes.]}}
baseline: plain
expects: {down: [longer], taken_back: [longer]}
ablate: {carrying: longer}
"""


def written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(tmp_path_factory.mktemp("run"))
    for site in SITES:
        write_ranking(run, site)
    return run


def test_without_a_run_the_effects_are_differences_of_the_pms_own_rewards(tmp_path: Path) -> None:
    pm, data = saved_inputs(tmp_path)
    result = analyse(ExperimentConfig(file=written(tmp_path, "own", OWN), model=pm, data=data, out=tmp_path / "out"))
    rm = RewardModel.load(pm)
    prompts = ["Is it?", "Was it?", "Will it be?", "Has it been?"]
    rewards = {
        answer: [rm.reward_alone(rm.text_ids([{"role": "user", "content": p}], answer)) for p in prompts]
        for answer in ("It is.", "It is. So it goes.")
    }
    effect = float(sum(rewards["It is. So it goes."]) - sum(rewards["It is."])) / 4
    (longer,) = (c for c in result.conditions if c.name == "longer")
    assert longer.effect is not None
    assert longer.effect.value == pytest.approx(effect, abs=1e-5)
    assert result.ablated is None
    assert (result.model, result.data) == (pm, data)
    assert pl.read_parquet(tmp_path / "out" / "own.parquet").equals(result.table)
    assert json.loads((tmp_path / "out" / "own.json").read_text()) == json.loads(json.dumps(result.as_json()))
    assert (tmp_path / "out" / "own.html").read_text() == result.page().html
    assert "A second sentence lowers the reward." in result.page().html


def test_on_a_run_features_are_chosen_on_some_fresh_prompts_and_measured_on_the_others(run: Run, tmp_path: Path) -> None:
    result = analyse(ExperimentConfig(file=written(tmp_path, "on_data", ON_DATA)), run=run)
    fresh = [run.pairs[i].prompt[-1]["content"] for i in run.of_split("measure")]
    assert result.prompts + result.chosen_on == len(fresh)
    assert sorted(set(result.table["prompt"])) == sorted(fresh[1::2])
    assert result.sd == run.sd
    assert result.ablated is not None
    assert result.ablated.features
    assert {f.feature for f in result.ablated.features} <= set(range(FEATURES))
    for f in result.ablated.features:
        assert f.tokens == run.top_tokens(result.ablated.site, f.feature)
        assert f.mean_effect == (0.1 if f.feature % 2 == 0 else -0.1)
    assert result.folder == run.folder / "evidence" / "experiments"
    assert {p.name for p in result.folder.iterdir()} == {"on_data.parquet", "on_data.json", "on_data.html"}


def test_a_run_folder_and_an_open_run_give_the_same(run: Run, tmp_path: Path) -> None:
    file = written(tmp_path, "on_data", ON_DATA)
    by_folder = analyse(ExperimentConfig(file=file, run=run.folder, out=tmp_path / "a"))
    by_run = analyse(ExperimentConfig(file=file, out=tmp_path / "b"), run=run)
    assert by_folder.table.equals(by_run.table)
    assert by_folder.as_json() | {"seconds": 0} == by_run.as_json() | {"seconds": 0}


def test_what_cannot_be_measured_is_one_sentence_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    unranked = small_run(tmp_path / "unranked", SITES[:1])
    own = written(tmp_path, "own", OWN)
    elsewhere = written(tmp_path, "elsewhere", OWN + "ablate: {site: resid_post.0, features: [1]}\n")
    beyond = written(tmp_path, "beyond", OWN + "ablate: {site: resid_post.1, features: [24]}\n")
    ablating = written(tmp_path, "ablating", ON_DATA)
    for file, on, told in (
        (own, None, "nothing to measure on; name a run folder with --run, or a PM"),
        ("weather", None, "weather is not there; name a YAML file, or one of dont_know"),
        (elsewhere, run, r"no SAE at resid_post\.0; it has resid_post\.1, resid_post\.2"),
        (beyond, run, r"The SAE at resid_post\.1 has 24 features, from 0; mend ablate\.features"),
        (ablating, unranked, r"not finished \(resid_post\.1\.parquet is missing\)"),
    ):
        with pytest.raises(InputError, match=told) as error:
            analyse(ExperimentConfig(file=file, out=tmp_path / "out"), run=on)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
