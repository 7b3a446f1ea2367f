"""The trunk is what runs on text: measured on one forward pass, whatever other lists of modules a model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    BartConfig,
    DebertaConfig,
    FunnelConfig,
    Gemma3Config,
    MarkupLMConfig,
    OpenAIGPTConfig,
)

from rmscope.activations.harvest import harvest
from rmscope.effects.requests import ablations
from rmscope.errors import InputError
from rmscope.model.checks import preflight
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from tests.model.small import BERT, BLOCKS, LLAMA, PAIRS, WINDOW, D, shared_pm, small_sae, tokenizer
from tests.model.test_own_forward import IDS, check_scores, drawn

TEXT = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, **IDS}
VISION = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": BLOCKS + 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TRUNKS = {
    "gemma3": (lambda: Gemma3Config(text_config=TEXT, vision_config=VISION), "Gemma3DecoderLayer"),
    "markuplm": (lambda: MarkupLMConfig(**BERT, **IDS), "MarkupLMLayer"),
    "albert": (lambda: AlbertConfig(**BERT, **IDS, embedding_size=16), "Layer"),
    "deberta": (
        lambda: DebertaConfig(**BERT, **IDS, relative_attention=True, pos_att_type=["p2c", "c2p"]), "DebertaLayer",
    ),
    "openai-gpt": (lambda: OpenAIGPTConfig(n_embd=D, n_layer=BLOCKS, n_head=4, n_positions=256, **IDS), "Block"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRUNKS)
def test_the_blocks_are_those_that_take_and_give_the_stream(kind: str) -> None:
    config, block = TRUNKS[kind]
    rm = check_scores(drawn(config()))
    assert [type(b).__name__ for b in rm.blocks] == [block] * BLOCKS
    found = {c.check: c for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}
    assert found["sites"].status == "ok", found["sites"].detail


@pytest.mark.parametrize("kind", TRUNKS)
def test_an_ablation_is_an_edit_after_its_block_alone(kind: str) -> None:
    rm = RewardModel(drawn(TRUNKS[kind][0]()), tokenizer(), Rendering(), kind)
    sae, site, t = small_sae(), "resid_post.1", rm.tokenize(PAIRS[0])
    sizes = []
    for _, found in ablations(rm, {site: sae}, [t], {0: {side: {site: None} for side in SIDES}}):
        for place in range(0, found.feature.numel(), 6):
            expected = without(rm, sae, t.side(found.side), t.divergence, int(found.feature[place]))
            assert float(found.effect[place]) == pytest.approx(expected, abs=2e-4)
            sizes.append(abs(expected))
    assert max(sizes) > 1e-3


def without(rm: RewardModel, sae: Any, ids: Tensor, start: int, feature: int) -> float:
    """r - r with a feature set to 0 after the second layer, by transformers' own forward and a counter of layers."""
    shared = hasattr(rm.blocks[1], "shared")
    layer = rm.blocks[1].shared[0] if shared else rm.blocks[1]
    rewards = []
    for edited in (False, True):
        calls = 0

        def edit(_m: Any, _a: Any, out: Any, edited: bool = edited) -> Any:
            nonlocal calls
            calls += 1
            if not edited or (shared and calls != 2):
                return None
            x = out[0] if isinstance(out, (tuple, list)) else out
            f = sae.encode(x[0])
            kept = f.clone()
            kept[start:, feature] = 0.0
            changed = x + (sae.decode(kept) - sae.decode(f))
            return (changed, *out[1:]) if isinstance(out, (tuple, list)) else changed

        handle = layer.register_forward_hook(edit)
        rewards.append(float(rm.reward_alone(ids)))
        handle.remove()
    return rewards[0] - rewards[1]


def test_of_an_encoder_decoder_the_blocks_are_the_decoders() -> None:
    """The reward is read from the decoder, which reads the text too: its stream carries all, the encoder's does not."""
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    made = drawn(BartConfig(d_model=D, encoder_layers=3, decoder_layers=2, decoder_start_token_id=1, **sizes, **IDS))
    rm = RewardModel(made, tokenizer(), Rendering("hh", append_eos=True), "bart")
    assert rm.blocks is made.model.decoder.layers
    tokens = rm.tokenize(PAIRS[0])
    batch = pad_texts([(0, "chosen", tokens.chosen, 1, rm.read_positions(tokens)["chosen"])], rm.pad_id)
    other = pad_texts([(0, "rejected", tokens.rejected, 1, rm.read_positions(tokens)["rejected"])], rm.pad_id)
    empty = [float(rm.rewards(b, {rm.sites[-1]: torch.zeros_like})[0]) for b in (batch, other)]
    assert empty[0] == pytest.approx(empty[1], abs=1e-6)  # nothing of the text is left


def test_a_model_without_such_blocks_scores_and_names_the_reason() -> None:
    config = FunnelConfig(d_model=D, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1, 1], **IDS)
    rm = check_scores(drawn(config))
    assert rm.sites == []
    with pytest.raises(InputError, match="FunnelForSequenceClassification has no residual stream that can be studied"):
        _ = rm.default_sites
    found = {c.check: c for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}
    assert found["sites"].status == "warn"
    assert "no residual stream" in found["sites"].detail


def test_a_pm_that_refuses_products_in_bfloat16_is_harvested_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmscope.hardware.has_fast_bfloat16", lambda _device: True)
    rm = RewardModel(drawn(TRUNKS["deberta"][0]()), tokenizer(), Rendering(), "deberta")
    store = harvest(rm, PAIRS, ["resid_post.1"], tmp_path)
    assert store.tokens("resid_post.1") > 100
    assert not rm.capabilities.bfloat16
    assert shared_pm("llama").capabilities.bfloat16
