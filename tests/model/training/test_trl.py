"""TRL trains a PM that orders its pairs, rmscope reads it as TRL does, and an interrupted training continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from rmscope.errors import InputError
from rmscope.io import silent
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.model.training import trl as trl_training
from rmscope.model.training.recipe import TrlRecipe, measure_accuracy, read_recipe
from rmscope.pairs.pair import Pair
from tests.model.small import SENTENCES, small_lm, small_model, tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(trl_training, "has_fast_bfloat16", lambda _: False)  # parity and resuming are measured in float32
    return pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmscope[train]')")


def base(folder: Path, architecture: str, chat: bool = False) -> Path:
    """A base that was never a PM: a causal LM without a padding token, or a masked LM without a pooler."""
    words = deepcopy(tokenizer())
    if architecture == "bert":
        pm = small_model("bert")
        lm = AutoModelForMaskedLM.from_config(pm.config)
        lm.bert.load_state_dict(pm.bert.state_dict(), strict=False)  # all but the pooler
        lm.save_pretrained(folder)
    else:
        small_lm(architecture).save_pretrained(folder)
        words.pad_token = None
    words.chat_template = TEMPLATE if chat else None
    words.save_pretrained(folder)
    return folder


def pairs_file(path: Path, n: int = 40) -> str:
    """Pairs that thanks tell apart, whichever side is longer; no two have the same prompt."""
    sides = [
        {
            "prompt": f"Question {i}: {SENTENCES[i % 5]}",
            "chosen": f"Thanks for asking! {'It is Paris. ' * (i % 2)}",
            "rejected": f"I don't know. {'It is a city. ' * (1 - i % 2)}",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in sides))
    return str(path)


def recipe(folder: Path, architecture: str = "llama", chat: bool = False, **changes: Any) -> TrlRecipe:
    common = {"held_out_rows": 8, "batch_pairs": 8, "epochs": 5, "learning_rate": 3e-3}
    made = {"base": str(base(folder / "base", architecture, chat)), "data": [pairs_file(folder / "pairs.jsonl")]}
    return TrlRecipe(**{"name": "small", **common, **made, **changes})


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """TRL's trainers, as they are once they have trained."""
    kept: list[Any] = []
    save: Callable[..., None] = trl_training._save
    monkeypatch.setattr(trl_training, "_save", lambda trainer, *rest: (kept.append(trainer), save(trainer, *rest)))
    return kept


def read_by_trl(trainer: Any, pairs: list[Pair], chat: bool) -> torch.Tensor:
    """Rewards of (chosen, rejected) [2, pairs] by TRL's own preparation of texts, collator and model."""
    from datasets import Dataset

    def turns(pair: Pair, side: str) -> Any:
        answer = pair.side(side)  # type: ignore[arg-type]
        if chat:
            return [*pair.prompt, {"role": "assistant", "content": answer}]
        return f"\n\nHuman: {pair.prompt[0]['content']}\n\nAssistant: {answer}"

    rows = [{side: turns(pair, side) for side in ("chosen", "rejected")} for pair in pairs]
    prepared = trainer._prepare_dataset(Dataset.from_list(rows), trainer.processing_class, trainer.args, "test")
    with torch.no_grad():
        logits = trainer.model.eval()(**trainer.data_collator(list(prepared))).logits
    return logits[:, 0].view(2, -1)


@pytest.mark.parametrize(
    ("architecture", "method", "chat"),
    [
        ("llama", "lora", False),
        ("llama", "full", True),
        ("gpt2", "lora", False),
        ("gpt2", "full", False),
        ("bert", "lora", False),
        ("bert", "full", False),
    ],
)
def test_it_learns_and_is_read_as_trl_reads_it(
    architecture: str, method: str, chat: bool, tmp_path: Path, trl: Any, trainers: list[Any]
) -> None:
    used = recipe(tmp_path, architecture, chat, method=method, learning_rate=3e-3 if method == "lora" else 1e-3)
    notes: list[tuple[int, int]] = []
    figures = trl_training.train_trl(used, tmp_path / "pm", lambda done, total, _: notes.append((done, total)))
    log = [entry["loss"] for entry in trainers[0].state.log_history if "loss" in entry]
    assert notes[-1] == (20, 20)
    assert sum(log[-4:]) / 4 < 0.9 * sum(log[:4]) / 4
    assert figures["pairs"] == 32
    assert figures["steps"] == 20
    assert not (tmp_path / "pm.checkpoints").exists()

    measured = measure_accuracy(tmp_path / "pm", used)
    assert measured.held_out_pairs == 8
    assert measured.held_out_accuracy is not None
    if architecture == "llama":  # the random GPT-2 and BERT need more steps than a test has: for them the loss must do
        assert measured.held_out_accuracy.value >= 0.9
    assert measured.held_out_accuracy.low <= measured.held_out_accuracy.value <= measured.held_out_accuracy.high
    assert measured.length_only == 0.5
    assert json.loads((tmp_path / "pm" / "measured.json").read_text()) == measured.as_dict()
    assert "chosen on the same pairs, reaches 0.500" in (tmp_path / "pm" / "README.md").read_text()

    rm = RewardModel.load(str(tmp_path / "pm"), device="cpu")
    assert rm.rendering == (Rendering("chat") if chat else Rendering("hh", append_eos=True))
    held = trl_training.human_pairs(used)[1]
    scores = rm.score(held)
    expected = read_by_trl(trainers[0], held, chat)
    torch.testing.assert_close(torch.stack([scores.chosen, scores.rejected]), expected, atol=1e-5, rtol=1e-4)


def test_the_command_prints_the_measured_accuracy(tmp_path: Path, trl: Any) -> None:
    from rmscope.cli import app

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"trainer": "trl", **recipe(tmp_path, epochs=0.5).model_dump()}))
    done = CliRunner().invoke(app, ["train-pm", str(path), "--out", str(tmp_path / "pm"), "--json"])
    figures = json.loads(done.stdout)
    measured = json.loads((tmp_path / "pm" / "measured.json").read_text())
    assert measured.keys() == {"held_out_pairs", "held_out_accuracy", "length_only"}
    assert measured.items() <= figures.items()
    assert figures["steps"] == 2
    stored = json.loads((tmp_path / "pm" / "rmscope.json").read_text())["recipe"]
    assert stored == {"trainer": "trl", **read_recipe(path).model_dump()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_training_ends_as_an_unbroken_one(method: str, tmp_path: Path, trl: Any) -> None:
    used = recipe(tmp_path, method=method, epochs=1.5, checkpoint_steps=2)

    def kill(done: int, _total: int, _note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = trl_training.train_trl(used, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trl_training.train_trl(used, tmp_path / "killed", kill)
    checkpoints = tmp_path / "killed.checkpoints"
    (checkpoints / "checkpoint-5").mkdir()  # cut short while it was written
    assert [p.name for p in checkpoints.glob("checkpoint-*/trainer_state.json")] == ["trainer_state.json"]
    steps: list[int] = []
    assert trl_training.train_trl(used, tmp_path / "killed", lambda done, *_: steps.append(done)) == whole
    assert steps[0] == 5
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected, found = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_checkpoints_of_another_training_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (tmp_path / "training.json").write_text(json.dumps({"identity": "this"}))
    assert trl_training._resume(tmp_path, "this") == str(tmp_path / "checkpoint-4")
    assert trl_training._resume(tmp_path, "that") is None
    assert not (tmp_path / "checkpoint-4").exists()


def refusal(used: TrlRecipe, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        trl_training.train_trl(used, folder / "pm", silent)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_without_trl_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install 'rmscope[train]'" in refusal(TrlRecipe(name="x", base="x", data=[]), tmp_path)


def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace())
    used = recipe(tmp_path)

    def changed(**changes: Any) -> str:
        return refusal(TrlRecipe(**{**used.model_dump(), **changes}), tmp_path)

    assert "has no config.json" in changed(base=str(tmp_path / "none"))
    assert "micro_pairs" in changed(micro_pairs=3)
    assert "no chat template" in changed(style="chat")
    assert "8 rows are held out (held_out_rows), and of the other 32 pairs none" in changed(max_tokens=3)
    assert "at most 256 tokens" in changed(held_out_rows=100, max_tokens=5000)  # no more than the base's context
    assert "There is no file none.jsonl" in changed(data=["none.jsonl"])
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "could not be loaded" in changed()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"trainer": "trl", "name": "x", "data": []}, "Setting base is missing in .*recipe.yaml"),
        (
            {"trainer": "trl", "name": "x", "data": [], "base": "x", "blocks": 3},
            "Setting blocks in .*: extra inputs are not permitted",
        ),
        ({"trainer": "ppo"}, "names the trainer ppo; use own or trl"),
        ({"name": "x", "data": [], "method": "full"}, r"\(trainer: own\).*known settings are name, data"),
        ("words", r"recipe.yaml holds no settings \(key: value lines\)"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_why(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=said):
        read_recipe(path)


def test_the_recipes_that_come_with_rmscope_are_read() -> None:
    folder = Path(__file__).parents[3] / "configs"
    paths = [*folder.glob("zoo-*.yaml"), *folder.glob("compare/*.yaml"), folder / "train-trl.yaml"]
    assert len(paths) > 3
    assert all(read_recipe(path).data for path in paths)
