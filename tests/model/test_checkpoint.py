"""Scalar heads are believed by their weights, whatever their names and whatever config.json calls the model."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.model.checks import notes
from rmscope.model.reward_model import RewardModel
from tests.model.small import PAIRS, D, shared_pm, small_model, tokenizer
from tests.model.test_loading import adapter, causal_base, refusal, save_small_pm

NAMES = ("LlamaForCausalLM", "LLMForSequenceRegression", "LlamaForTokenClassification", "TinyScoreModel")
HEADS = (
    "v_head.summary", "v_head", "value_head", "regression_head", "score_head", "reward_head", "some.other.name",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_pm(tmp_path_factory.mktemp("pm"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_head(folder: Path, name: str, **others: Tensor) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[f"{name}.weight"] = weights.pop("score.weight")
        weights |= {f"{name}.{key}": value for key, value in others.items()}

    rewrite(folder, change)


def load(folder: Path, **options: Any) -> RewardModel:
    return RewardModel.load(str(folder), device="cpu", **options)


def same_rewards(rm: RewardModel, mean: float = 0.0, std: float = 1.0) -> None:
    expected = shared_pm("llama").score(PAIRS)
    torch.testing.assert_close(rm.score(PAIRS).chosen, (expected.chosen - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_weight_makes_a_pm_of_what_config_calls_something_else(name: str, copy: Path) -> None:
    configure(copy, architectures=[name])
    same_rewards(load(copy))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaRewardModel"])
def test_a_head_under_another_name_is_found(name: str, architecture: str, copy: Path) -> None:
    configure(copy, architectures=[architecture])
    rename_head(copy, name)
    rm = load(copy)
    same_rewards(rm)
    assert any(f"{name} of the checkpoint" in note for note in notes(rm))
    assert rm.identity == load(copy).identity
    assert rm.capabilities.resume


@pytest.mark.parametrize("name", ["v_head.summary", "score"])
def test_the_bias_of_a_head_is_part_of_the_reward(name: str, copy: Path) -> None:
    configure(copy, architectures=["LlamaForTokenClassification"])
    rename_head(copy, name, bias=torch.tensor([0.75]))
    same_rewards(load(copy), mean=-0.75)


def test_a_value_head_in_a_file_of_its_own_is_read_beside_the_model_and_beside_an_adapter(
    folder: Path, tmp_path: Path
) -> None:
    base = causal_base(tmp_path / "base")
    head = {"v_head.summary.weight": torch.randn(1, D), "v_head.summary.bias": torch.ones(1)}
    path, _ = adapter(folder, tmp_path / "adapter", head=False)
    for place in (base, path):
        save_file(head, place / "value_head.safetensors")
        rm = load(base, adapter=str(path) if place == path else None)
        hidden = rm.model.base_model(rm.tokenize(PAIRS[0]).chosen[None]).last_hidden_state[0, -1]
        expected = float(hidden @ head["v_head.summary.weight"][0] + 1)
        assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(expected, abs=1e-4)
        (place / "value_head.safetensors").unlink()


def test_rewards_that_the_config_normalises_are_normalised(copy: Path) -> None:
    configure(copy, architectures=["LLMForSequenceRegression"], normalize_reward=True, mean=0.5, std=2.0)
    rename_head(copy, "value_head")
    rm = load(copy)
    same_rewards(rm, 0.5, 2.0)
    assert any("(r - 0.5) / 2, as its config says" in note for note in notes(rm))
    configure(copy, std=0.0)
    assert "mean and std are [0.5, 0.0]" in refusal(str(copy))
    configure(copy, normalize_reward=False)
    same_rewards(load(copy))


def test_a_pm_that_config_calls_by_its_own_class_is_normalised_too(copy: Path) -> None:
    configure(copy, normalize_reward=True, mean=-1.0, std=0.5)
    same_rewards(load(copy), -1.0, 0.5)


def test_normalised_rewards_of_another_kind_of_head_are_refused_not_dropped(copy: Path) -> None:
    configure(copy, normalize_reward=True, mean=0.5, std=2.0, num_labels=2, id2label={"0": "a", "1": "b"})
    rewrite(copy, lambda weights: weights.update({"score.weight": torch.randn(2, D)}))
    assert "asks for normalised rewards" in refusal(str(copy))


def test_weights_that_are_no_scalar_head_are_listed(copy: Path) -> None:
    configure(copy, architectures=["LlamaForCausalLM"])

    def change(weights: dict[str, Tensor]) -> None:
        weights["reward_head.0.weight"] = torch.zeros(8, D)
        weights["probe.weight"] = torch.zeros(3, D)
        del weights["score.weight"]

    rewrite(copy, change)
    text = refusal(str(copy))
    assert "without a scalar head" in text
    assert f"probe.weight [3, {D}]" in text


def test_two_heads_are_not_guessed_between(copy: Path) -> None:
    configure(copy, architectures=["LlamaForCausalLM"])
    rename_head(copy, "reward_head")
    rewrite(copy, lambda weights: weights.update({"cost_head.weight": torch.ones(1, D)}))
    assert "several scalar heads (cost_head.weight, reward_head.weight)" in refusal(str(copy))


def test_a_padding_token_that_the_embeddings_do_not_hold_is_no_padding(copy: Path) -> None:
    before = load(copy).score(PAIRS)
    configure(copy, pad_token_id=300)
    rm = load(copy)
    torch.testing.assert_close(rm.score(PAIRS).chosen, before.chosen, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_was_trained_with_added_tokens_brings_their_embeddings(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = small_model("llama")
    model.resize_token_embeddings(301, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    words = shutil.copytree(folder, tmp_path / "words")
    grown = tokenizer().from_pretrained(words)
    grown.add_special_tokens({"pad_token": "[PAD]"})
    grown.save_pretrained(tmp_path / "adapter")
    rm = load(folder, adapter=str(tmp_path / "adapter"))
    assert rm.pad_id == 300
    ids = rm.tokenize(PAIRS[0]).chosen
    with torch.no_grad():
        expected = float(wrapped.eval()(ids[None]).logits[0, 0])
    assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(expected, abs=1e-5)


# Broken and hostile checkpoints


class Payload:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_pickle_that_would_run_code_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert str(copy) in refusal(str(copy))
    torch.save({"score.weight": Payload()}, copy / "pytorch_model.bin")
    assert str(copy) in refusal(str(copy))
    configure(copy, architectures=["LlamaForCausalLM"])
    assert str(copy) in refusal(str(copy))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"llama"', "{}", '{"model_type": 7}', '{"model_type": "llama", "hidden_size": null}']
)
def test_a_config_that_is_none_is_a_sentence(text: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    assert str(copy) in refusal(str(copy))


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": 5}, {"architectures": []}, {"num_hidden_layers": -1}, {"hidden_size": "wide"},
        {"num_attention_heads": 0}, {"vocab_size": None}, {"rope_parameters": []}, {"id2label": []},
    ],
)  # fmt: skip
def test_a_config_with_a_setting_that_cannot_be_is_a_sentence_or_loads(settings: dict[str, Any], copy: Path) -> None:
    configure(copy, **settings)
    refusals = []
    try:
        same_rewards(load(copy))
    except InputError as error:
        refusals.append(str(error))
    assert all(str(copy) in text for text in refusals)


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_block_that_the_config_does_not_count_is_not_dropped(blocks: int, copy: Path) -> None:
    configure(copy, num_hidden_layers=blocks)
    assert f"model.layers.{blocks}." in refusal(str(copy))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, copy: Path) -> None:
    rewrite(copy, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(value))
    assert "model.layers.1.mlp.up_proj.weight with numbers that are not finite" in refusal(str(copy))


def test_a_sentencepiece_file_without_its_library_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr("rmscope.model.loading.find_spec", lambda _name: None)
    text = refusal(str(copy))
    assert "spm.model" in text
    assert "pip install sentencepiece protobuf" in text


def test_a_head_of_several_maps_is_refused_and_not_read_in_part(copy: Path) -> None:
    rename_head(copy, "v_head.out")
    rewrite(copy, lambda weights: weights.update({"v_head.dense.weight": torch.eye(D)}))
    configure(copy, architectures=["LlamaForCausalLM"])
    assert "head of more than one map (v_head.out.weight, v_head.dense.weight)" in refusal(str(copy))
