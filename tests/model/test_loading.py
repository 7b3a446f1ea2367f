"""A PM that can be loaded scores as it did before it was saved; what is none is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rmscope.errors import InputError
from rmscope.model import loading
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from tests.model.small import DECODERS, ENCODERS, OTHERS, PAIRS, shared_pm, small_model, small_pm, tokenizer


def save_small_pm(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    small_model(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_pm(tmp_path_factory.mktemp("pm"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        RewardModel.load(*args, device="cpu", **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS, *ENCODERS])
def test_a_saved_pm_loads_and_scores_as_before(architecture: str, tmp_path: Path) -> None:
    rm = RewardModel.load(str(save_small_pm(tmp_path, architecture)), device="cpu")
    expected = small_pm(architecture).score(PAIRS)
    found = rm.score(PAIRS)
    torch.testing.assert_close(found.chosen, expected.chosen, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.rejected, expected.rejected, atol=1e-6, rtol=0)
    assert rm.identity == shared_pm(architecture).identity
    assert not any(p.requires_grad for p in rm.model.parameters())
    assert not rm.model.training


def test_the_rendering_beside_the_pm_is_taken_and_is_part_of_its_identity(copy: Path, folder: Path) -> None:
    (copy / "rmscope.json").write_text(json.dumps({"rendering": {"style": "plain", "append_eos": True}}))
    rm = RewardModel.load(str(copy), device="cpu")
    assert rm.rendering == Rendering("plain", True)
    assert rm.identity != RewardModel.load(str(folder), device="cpu").identity


def test_the_model_card_beside_the_pm_or_the_adapter_is_read(copy: Path, folder: Path, tmp_path: Path) -> None:
    card = "tags:\n- reward-trainer\n\n- TRL: 0.25.1\n"
    path, _ = adapter(folder, tmp_path / "adapter")
    (path / "README.md").write_text(card)
    assert RewardModel.load(str(folder), device="cpu", adapter=str(path)).rendering == Rendering("hh", append_eos=True)
    assert RewardModel.load(str(copy), device="cpu").rendering == Rendering("hh")
    (copy / "README.md").write_text(card)
    assert RewardModel.load(str(copy), device="cpu").rendering == Rendering("hh", append_eos=True)


def test_bfloat16_is_loaded_as_asked(folder: Path) -> None:
    rm = RewardModel.load(str(folder), "bfloat16", "cpu")
    assert rm.dtype == torch.bfloat16
    scores = rm.score(PAIRS)
    assert scores.chosen.dtype == torch.float32
    torch.testing.assert_close(scores.chosen, shared_pm("llama").score(PAIRS).chosen, atol=0.3, rtol=0.1)


def test_a_causal_lm_has_no_scalar_head(copy: Path) -> None:
    AutoModelForCausalLM.from_config(small_model("llama").config).save_pretrained(copy)
    text = refusal(str(copy))
    assert "LlamaForCausalLM, without a scalar head" in text
    assert str(copy) in text


def test_a_head_that_would_be_newly_initialised_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "lacks score.weight" in refusal(str(copy))


def test_a_block_that_would_be_newly_initialised_is_refused(copy: Path) -> None:
    weights = {k: v for k, v in load_file(copy / "model.safetensors").items() if ".layers.2." not in k}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "lacks model.layers.2." in refusal(str(copy))


def test_a_config_without_architectures_is_judged_by_its_weights(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    (copy / "config.json").write_text(json.dumps(config))
    assert RewardModel.load(str(copy), device="cpu").identity == shared_pm("llama").identity


def test_weights_of_another_shape_than_the_config_says_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    config["label2id"] = {"bad": 0, "good": 1}
    (copy / "config.json").write_text(json.dumps(config))
    assert "score.weight" in refusal(str(copy))


def test_several_outputs_need_a_choice(tmp_path: Path) -> None:
    folder = save_small_pm(tmp_path / "three", num_labels=3)
    assert "3 outputs" in refusal(str(folder))
    rm = RewardModel.load(str(folder), device="cpu", output=2)
    ids = rm.tokenize(PAIRS[0]).chosen
    with torch.no_grad():
        expected = rm.model(ids[None]).logits[0, 2]
    assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(float(expected), abs=1e-5)
    assert "3 outputs" in refusal(str(folder), output=3)
    assert "2 weights" in refusal(str(folder), output=[1.0, 2.0])


@pytest.mark.parametrize("spell", [str, lambda p: "./nowhere/at-all", lambda p: "~/nowhere-at-all"])
def test_a_folder_that_is_missing_or_empty_is_named(spell: Callable[[Path], str], tmp_path: Path) -> None:
    source = spell(tmp_path / "nothing")
    assert source in refusal(source)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refusal(str(empty))


def test_a_folder_may_be_named_from_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert RewardModel.load(f"~/{folder.name}", device="cpu").identity == shared_pm("llama").identity


def test_a_damaged_config_or_checkpoint_is_an_input_error(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not safetensors at all")
    assert str(copy) in refusal(str(copy))
    (copy / "config.json").write_text("{")
    assert str(copy) in refusal(str(copy))


def test_a_pm_without_a_tokenizer_is_an_input_error(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    assert "tokenizer" in refusal(str(copy))


def test_unknown_names_list_the_known_ones(folder: Path) -> None:
    assert "float32, bfloat16 or float16" in refusal(str(folder), "float8")
    assert "zoo:hh, zoo:planted" in refusal("zoo:nothing")
    assert "base without a scalar head" in refusal("zoo:smollm2")
    assert "own adapter" in refusal("zoo:hh", adapter="somewhere")
    assert "only PMs on the hub have revisions" in refusal("zoo:hh", revision="v2")


def test_a_sharded_checkpoint_is_loaded_whole(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert RewardModel.load(str(tmp_path), device="cpu").identity == shared_pm("llama").identity


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "balanced"])
def test_a_pm_is_not_spread_over_several_devices(folder: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device} is not a device: a PM is studied on one"):
        RewardModel.load(str(folder), device=device)


def test_bfloat16_of_our_own_folders_leaves_rotary_frequencies_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    monkeypatch.setattr(loading, "load_adapted", lambda _folder: (model, tokenizer()))
    rm = RewardModel.load("zoo:hh", "bfloat16", "cpu")
    assert {p.dtype for p in rm.model.parameters()} == {torch.bfloat16}
    assert torch.equal(rm.model.model.rotary_emb.inv_freq, before)


# Code that comes with a checkpoint

GATED = """
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.regression_layer = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.gating = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = torch.ones_like(input_ids).sum(1) - 1 if attention_mask is None else attention_mask.sum(1) - 1
        at = hidden[torch.arange(len(last)), last]
        score = (self.regression_layer(at) * self.gating(at).softmax(-1)).sum(-1)
        return SequenceClassifierOutput(logits=score)
"""


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """A PM with a head of its own, as ArmoRM's: three attributes, gated to one reward, logits [texts]."""
    (tmp_path / "modeling_gated.py").write_text(GATED)
    namespace: dict[str, Any] = {}
    exec(GATED, namespace)
    torch.manual_seed(0)
    namespace["LlamaForRewardModelWithGating"](small_model("llama").config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_gated.LlamaForRewardModelWithGating"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.usefixtures("modules_cache")
def test_code_that_comes_with_a_checkpoint_runs_only_when_trusted(gated: Path) -> None:
    text = refusal(str(gated))
    assert "LlamaForRewardModelWithGating, whose code comes with its checkpoint" in text
    assert "--trust-remote-code" in text
    rm = RewardModel.load(str(gated), device="cpu", trust_remote_code=True)
    assert type(rm.model).__name__ == "LlamaForRewardModelWithGating"
    expected = [[float(rm.model(rm.tokenize(p).side(s)[None]).logits[0]) for s in ("chosen", "rejected")] for p in PAIRS]
    scores = rm.score(PAIRS)
    torch.testing.assert_close(
        torch.stack([scores.chosen, scores.rejected], 1), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )
    assert not rm.capabilities.resume  # its head is custom: its own forward is used


# Adapters


def adapter(folder: Path, target: Path, head: bool = True) -> tuple[Path, torch.Tensor]:
    """A random LoRA adapter on the PM in ``folder``, and the reward of the first text with it merged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["score"] if head else None)
    wrapped = get_peft_model(small_model("llama"), config)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    wrapped.save_pretrained(target)
    ids = shared_pm("llama").tokenize(PAIRS[0]).chosen
    with torch.no_grad():
        return target, wrapped.eval()(ids[None]).logits[0, 0]


@pytest.mark.parametrize("head", [True, False])
def test_an_adapter_is_merged(folder: Path, tmp_path: Path, head: bool) -> None:
    path, reward = adapter(folder, tmp_path / "adapter", head)
    rm = RewardModel.load(str(folder), device="cpu", adapter=str(path))
    assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(float(reward), abs=1e-5)
    assert rm.sites == shared_pm("llama").sites
    assert rm.identity != shared_pm("llama").identity


def test_an_adapters_folder_is_a_pm_by_itself(folder: Path, tmp_path: Path) -> None:
    path, reward = adapter(folder, tmp_path / "adapter")
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "names no base" in refusal(str(path))
    base = causal_base(tmp_path / "base")
    (path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    rm = RewardModel.load(str(path), device="cpu")
    assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(float(reward), abs=1e-5)
    assert rm.rendering == Rendering("hh")
    words = deepcopy(tokenizer())
    words.pad_token = words.eos_token  # as TRL does where there is none
    words.save_pretrained(path)
    (path / "rmscope.json").write_text(json.dumps({"rendering": {"style": "plain", "append_eos": True}}))
    for rm in (RewardModel.load(str(path), device="cpu"), RewardModel.load(str(base), device="cpu", adapter=str(path))):
        assert rm.rendering == Rendering("plain", append_eos=True)
        ids = rm.tokenize(PAIRS[0]).chosen
        assert rm.read_position(ids) == ids.numel() - 2  # the token before eos, which is padding to the model


def causal_base(target: Path) -> Path:
    """The PM's trunk as a causal LM, whose config says nothing of a head."""
    pm = small_model("llama")
    config = type(pm.config)(
        **{k: v for k, v in pm.config.to_dict().items() if k not in ("id2label", "label2id", "architectures")}
    )
    base = AutoModelForCausalLM.from_config(config)
    base.model.load_state_dict(pm.model.state_dict())
    base.save_pretrained(target)
    tokenizer().save_pretrained(target)
    return target


def test_an_adapter_that_brings_the_head_makes_a_pm_of_a_causal_lm(folder: Path, tmp_path: Path) -> None:
    path, reward = adapter(folder, tmp_path / "adapter")
    rm = RewardModel.load(str(causal_base(tmp_path / "base")), device="cpu", adapter=str(path))
    assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(float(reward), abs=1e-5)


def test_an_adapter_without_a_head_does_not(folder: Path, tmp_path: Path) -> None:
    path, _ = adapter(folder, tmp_path / "adapter", head=False)
    assert "LlamaForCausalLM, without a scalar head" in refusal(str(causal_base(tmp_path / "base")), adapter=str(path))


def test_an_adapter_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(str(folder), adapter=str(tmp_path / "none"))


def test_a_gptj_checkpoint_of_2023_with_its_mask_buffers_is_loaded(tmp_path: Path) -> None:
    """pytorch_model.bin with ``attn.bias`` and ``attn.masked_bias``, which GPT-J kept in its weights then."""
    model = small_model("gptj")
    save_small_pm(tmp_path, "gptj")
    (tmp_path / "model.safetensors").unlink()
    buffers: dict[str, torch.Tensor] = {}
    for i in range(len(model.transformer.h)):
        buffers[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
        buffers[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save({**model.state_dict(), **buffers}, tmp_path / "pytorch_model.bin")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        loaded, made = RewardModel.load(str(tmp_path)).model(ids).logits, model.eval()(ids).logits
    assert torch.allclose(loaded, made, atol=1e-5)
