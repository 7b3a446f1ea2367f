"""Finding a PM's base, sharing weights with it, and refusing one that is not it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from rmscope.errors import InputError
from rmscope.model.base import Base
from rmscope.model.reward_model import RewardModel
from tests.model.based import FIRST, pm_with_base
from tests.model.small import BLOCKS, DECODERS, shared_pm, small_model, tokenizer


@pytest.mark.parametrize("architecture", DECODERS)
def test_only_the_trained_blocks_have_weights_of_their_own(architecture: str) -> None:
    rm = pm_with_base(architecture)
    base, own = rm.base, {p.data_ptr() for p in rm.model.parameters()}
    assert base is not None
    extra = {p.data_ptr() for p in base.model.parameters()} - own
    trained = {p.data_ptr() for block in base.blocks[FIRST:] for p in block.parameters() if p.dim() == 2}
    assert extra == trained
    assert (base.first, base.start) == (FIRST, f"resid_post.{FIRST - 1}")
    assert [change > 0 for change in base.changes] == [i >= FIRST for i in range(BLOCKS)]


def test_after_a_full_fine_tune_nothing_is_run_for_both() -> None:
    base = pm_with_base("llama", "full").base
    assert base is not None
    assert (base.first, base.start) == (0, None)
    assert base.embeddings_differ


def test_a_part_of_the_stream_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=rf"changed nothing before block {FIRST}; name a site from diff.{FIRST} to diff.3"):
        pm_with_base("llama").site_index("diff.1")
    with pytest.raises(InputError, match=r"without the PM's base, .* give --base, or study resid_post\.2"):
        shared_pm("llama").site_index("base.2")
    with pytest.raises(InputError, match="There is no site 'diff"):
        pm_with_base("llama").site_index("diff.9")


def test_a_base_that_is_not_the_pms_is_refused() -> None:
    rm = shared_pm("llama")
    with pytest.raises(InputError, match="has the PM's own weights"):
        Base(deepcopy(rm.model).base_model, "same", rm)
    with pytest.raises(InputError, match="has 2 blocks, the PM 4"):
        Base(small_model("llama", num_hidden_layers=2).base_model, "short", rm)
    with pytest.raises(InputError, match="name the base that the PM was trained from"):
        Base(small_model("llama", hidden_size=64).base_model, "wide", rm)


def saved(folder: Path, seed: int | None = None) -> Path:
    """A small PM as a folder; with a seed, its last block is another one."""
    model = small_model("llama")
    if seed is not None:
        torch.manual_seed(seed)
        model.model.layers[-1].mlp.up_proj.weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_the_base_is_that_of_the_settings_or_of_the_card(tmp_path: Path) -> None:
    base, pm = saved(tmp_path / "base"), saved(tmp_path / "pm", seed=3)
    assert RewardModel.load(str(pm), device="cpu").base is None
    given = RewardModel.load(str(pm), device="cpu", base=str(base)).base
    assert given is not None
    (pm / "README.md").write_text(f"---\nbase_model: {base}\n---\nA PM.\n")
    read = RewardModel.load(str(pm), device="cpu").base
    assert read is not None
    assert (
        (read.first, read.name, read.identity) == (given.first, given.name, given.identity) == (3, str(base), read.identity)
    )


def test_the_base_of_an_adapter_is_what_it_was_put_on(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = saved(tmp_path / "base")
    wrapped = get_peft_model(small_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2, 3]))
    for name, p in wrapped.named_parameters():
        if "lora" in name:
            p.data.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = RewardModel.load(str(folder), device="cpu", adapter=str(tmp_path / "adapter")).base
    assert base is not None
    assert (base.first, base.name) == (2, str(folder))


def test_the_base_of_the_zoos_pms_is_the_zoos_base() -> None:
    base = RewardModel.load("zoo:planted", device="cpu").base
    assert base is not None
    assert (base.first, base.start, base.name) == (11, "resid_post.10", "zoo:smollm2")
    assert RewardModel.load("zoo:planted", device="cpu", base="none").base is None


def test_a_base_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    base, pm = saved(tmp_path / "base"), saved(tmp_path / "pm", seed=3)
    words = json.loads((base / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:5]
    (base / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="splits text into other tokens"):
        _ = RewardModel.load(str(pm), device="cpu", base=str(base)).base
