"""Small random preference models of real architectures, a tokenizer learned on a few sentences, random SAEs, pairs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.sae.base import Sae
from rmscope.sae.gated import GatedSae
from rmscope.sae.topk import TopKSae

D, BLOCKS, VOCABULARY = 32, 4, 300
PAD, EOS, UNK = 0, 1, 2
WINDOW = 64
"""Longer than the probe text that measures packing (62 tokens), shorter than some of the pairs' texts."""

COMMON = {"hidden_size": D, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
LLAMA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
GPT = {"n_embd": D, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": WINDOW},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "gpt_neox": {**COMMON, "intermediate_size": 48, "max_position_embeddings": 256, "rotary_pct": 0.5},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt2": GPT,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": D, "max_position_embeddings": 256},
    "phi": {**COMMON, "intermediate_size": 48, "max_position_embeddings": 256},
    "olmo": LLAMA,
}
"""The decoders that the split forward is promised for."""
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": D, "n_layer": BLOCKS, "n_head": 4},
    "falcon": {**COMMON, "alibi": True, "max_position_embeddings": 256},
    "gpt_neo": {
        **COMMON, "num_layers": BLOCKS, "num_heads": 4, "window_size": WINDOW, "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], BLOCKS // 2]],
    },
}  # fmt: skip
"""Decoders that take no 4-D mask, or keep one of their own."""
BERT = {**COMMON, "intermediate_size": 48, "max_position_embeddings": 256}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT,
    "deberta-v2": {
        **BERT, "relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": D,
    },
}  # fmt: skip
"""DeBERTa-v3 is deberta-v2 with these settings."""
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
    "zamba": {**LLAMA, "mamba_dt_rank": 4, "n_mamba_heads": 2, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "qwen3_next": {**LLAMA, **LINEAR, **EXPERTS, "head_dim": 8},
    "qwen3_5_text": {**LLAMA, **LINEAR, "head_dim": 8},
    "minimax": {**LLAMA, "head_dim": 8, "num_local_experts": 4, "layer_types": LINEAR["layer_types"]},
}
"""Decoders with recurrent or linear-attention layers, which keep no keys and values."""
DECODERS = list(SETTINGS)
ENCODER = "bert"

SENTENCES = [
    "Human: What is the capital of France? Assistant: It is Paris, on the Seine.",
    "Thanks for asking! You're right, I was wrong about the river; see https://example.org for more.",
    "I don't know. There is no problem at all, the answer depends on what you would like to hear.",
    "Water boils at one hundred degrees, the mountain is high, and the children sleep in the small house.",
    "How do I bake bread without an oven? Use a pan with a lid, a little oil, and wait for an hour.",
]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as GPT-2's, of 300 tokens; pad 0, eos 1."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def small_model(architecture: str, dtype: torch.dtype = torch.float32, gain: float = 2.0, **changes: Any) -> Any:
    """A random model whose weights are large enough (``gain``) that every block and position matters to its reward."""
    settings = {**SETTINGS, **OTHERS, **HYBRIDS, **ENCODERS}[architecture]
    settings = {
        "vocab_size": VOCABULARY,
        "num_labels": 1,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        **settings,
        **changes,
    }
    torch.manual_seed(DECODERS.index(architecture) if architecture in DECODERS else 99)
    config = AutoConfig.for_model(architecture, bos_token_id=EOS, **settings)
    return _draw_weights(AutoModelForSequenceClassification.from_config(config), gain).to(dtype)


def small_lm(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same trunk as a causal language model."""
    config = small_model(architecture, **changes).config
    return _draw_weights(AutoModelForCausalLM.from_config(config), 2.0).to(dtype)


def _draw_weights(model: Any, gain: float) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "emb" in name or "wte" in name or "wpe" in name else gain / p.shape[-1] ** 0.5)
    return model


def small_pm(
    architecture: str, dtype: torch.dtype = torch.float32, append_eos: bool = False, style: Any = "hh", **changes: Any
) -> RewardModel:
    rendering = Rendering(style=style, append_eos=append_eos)
    return RewardModel(small_model(architecture, dtype, **changes), tokenizer(), rendering, architecture)


def saved_pm(folder: Path) -> str:
    """A small PM with a context of 1,024 tokens, as a folder that commands take."""
    small_model("llama", max_position_embeddings=1024).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@cache
def shared_pm(architecture: str, dtype: torch.dtype = torch.float32, gain: float = 2.0) -> RewardModel:
    """The same, built once; for tests that leave it as it is."""
    return small_pm(architecture, dtype, gain=gain)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


PAIRS = [
    Pair("paris", user("What is the capital of France?"), "It is Paris, on the Seine.", "It is a large city, I was told."),
    Pair("bread", user("How do I bake bread?"), "Use a pan with a lid, and wait.", "I don't know."),
    Pair("prefix", user("Is water wet?"), "You're right", "You're right, thanks for asking!"),
    Pair("long", user("Tell me about the house. " * 3), "The children sleep in the small house. " * 2, "No."),
]


def small_sae(d: int = D, m: int = 96, k: int = 6, seed: int = 0, kind: str = "topk", bias: float = 0.1) -> Sae:
    """A random SAE with decoder rows of length 1; half of the encoder is its decoder, so that features fire unevenly."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = torch.nn.functional.normalize(random(m, d), dim=1)
    weights = {"W_dec": decoder, "W_enc": (decoder + 0.3 * random(m, d)).t(), "b_dec": bias * random(d)}
    if kind == "topk":
        return TopKSae(d, m, k=k).fill({**weights, "b_enc": 0.1 * random(m)})
    gates = {"b_gate": -(0.7 + 0.2 * random(m).abs()), "b_mag": 0.1 * random(m), "r_mag": 0.1 * random(m)}
    return GatedSae(d, m).fill({**weights, **gates})
