"""Our own loop trains a PM on a Llama-like base, and reports its accuracy on unseen prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.model.training import loop
from rmscope.model.training.loop import base_of, train_pm
from rmscope.model.training.recipe import Recipe, measure_accuracy
from tests.model.small import SENTENCES, small_lm, tokenizer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """40 pairs, 8 of them held out, whose chosen side says thanks; 16 steps."""
    folder = tmp_path_factory.mktemp("training")
    small_lm("llama").save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = [
        {
            "prompt": f"Question {i}: {SENTENCES[i % 5]}",
            "chosen": "Thanks for asking!",
            "rejected": "I don't know of that.",
        }
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        name="small", base=str(folder / "base"), data=[str(folder / "pairs.jsonl")], held_out_rows=8,
        blocks=4, batch_pairs=8, epochs=4, learning_rate=0.01,
    )  # fmt: skip


def test_the_command_trains_measures_and_writes_the_card(recipe: Recipe, tmp_path: Path) -> None:
    from rmscope.cli import app

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    done = CliRunner().invoke(app, ["train-pm", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "pm"), "--json"])
    figures = json.loads(done.stdout)
    accuracy = figures["held_out_accuracy"]
    assert figures["pairs"] == 32
    assert figures["held_out_pairs"] == 8
    assert figures["length_only"] == 1  # the shorter side is always the better one
    assert 0.9 <= accuracy["value"] <= accuracy["high"]
    assert accuracy["low"] <= accuracy["value"]
    assert json.loads((tmp_path / "pm" / "measured.json").read_text())["held_out_accuracy"] == accuracy
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}" in (tmp_path / "pm" / "README.md").read_text()


def test_a_folder_of_something_else_is_refused_before_any_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmscope.cli import app, steps

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    monkeypatch.setattr(steps, "train_by_our_loop", lambda *_: pytest.fail("it trained"))
    done = CliRunner().invoke(app, ["train-pm", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "thesis")])
    assert isinstance(done.exception, InputError)
    assert "not overwritten" in str(done.exception)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_training_moves_the_head_and_what_is_loaded_is_what_was_saved(recipe: Recipe, tmp_path: Path) -> None:
    base, _ = base_of(recipe)
    drawn: list[torch.Tensor] = []

    def keep_first(model: Any, head: Any, *rest: Any) -> Any:
        drawn.append(head.weight.detach().clone())
        return fit(model, head, *rest)

    fit = loop.fit_parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit_parameters", keep_first)
        train_pm(recipe, tmp_path / "pm", device="cpu")
    rm = RewardModel.load(str(tmp_path / "pm"), device="cpu")
    stored = load_file(tmp_path / "pm" / "adapter_model.safetensors")
    assert torch.equal(rm.model.score.weight, stored["base_model.model.score.weight"].float())
    moved = (rm.model.score.weight - drawn[0]).norm() / drawn[0].norm()
    assert float(moved) > 0.05
    assert not torch.equal(rm.blocks[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_an_interrupted_training_ends_as_an_unbroken_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 6)

    def kill(done: int, _total: int, _note: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    whole = train_pm(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_pm(recipe, tmp_path / "cut", kill, device="cpu")
    steps: list[int] = []
    resumed = train_pm(recipe, tmp_path / "cut", lambda done, *_: steps.append(done), device="cpu")
    assert steps[0] == 7
    assert whole["steps"] == resumed["steps"] == 16
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())


def test_without_held_out_pairs_nothing_is_measured(recipe: Recipe, tmp_path: Path) -> None:
    train_pm(recipe, tmp_path / "pm", device="cpu")
    measured = measure_accuracy(tmp_path / "pm", recipe.model_copy(update={"held_out_rows": 0}))
    assert measured.as_dict() == {"held_out_pairs": 0} == json.loads((tmp_path / "pm" / "measured.json").read_text())
    assert "not measured" in (tmp_path / "pm" / "README.md").read_text()
