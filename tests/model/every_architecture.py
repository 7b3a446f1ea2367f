"""Every sequence-classification class of transformers as a small random PM: what rmscope says, beside plain forwards.

``python -m tests.model.every_architecture`` writes docs/reference/architectures.md. With names of architectures it prints
these alone.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rmscope.effects.requests import ablations
from rmscope.errors import InputError
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from tests.model.small import EOS, PAD, PAIRS, VOCABULARY, small_sae, tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
WIDTH, BLOCKS, HEADS, SITE = 32, 4, 4, "resid_post.1"
LARGEST = 30e6
"""Parameters of a model that is still small."""
EQUAL = 1e-3
"""Of SD(r): how far a reward or an effect may be from that of a plain forward."""
SMALLEST = 1e-3
"""The smallest SD(r), and of SD(r) the smallest largest effect, that can be compared."""
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "pooler_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "d_inner", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1024),
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY, "entity_vocab_size": 8, "entity_emb_size": 8, "type_vocab_size": 2, "num_labels": 1,
    "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS, "classifier_proj_size": 16, "n_group": 1,
    "topk_group": 1, "languages": ["en"], "default_language": "en", "mamba_headdim": 8, "n_mamba_heads": 8,
    "attention_hidden_size": 2 * WIDTH, "cross_attention_hidden_size": WIDTH, "attention_head_dim": 16,
    "attn_layer_period": 2, "attn_layer_offset": 1, "qk_head_dim": 16, "image_size": 8, "patch_size": 4, "input_size": 8,
    "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (32, 32), "attention_head_size": 8, "feed_forward_size": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "d_latents": WIDTH, "num_latents": 16, "num_self_attends_per_block": 2, "coordinate_size": 4, "shape_size": 8,
}  # fmt: skip
"""What makes a model of any class small, whatever it calls it; names that a class does not have are left out."""
DROPOUT = ("dropout", "pdrop", "drop_prob")


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of an architecture: ``agrees``, ``refused``, ``wrong``, ``not judged`` or ``not built``; and how."""

    architecture: str
    verdict: str
    how: str


class NothingMovesError(Exception):
    """With random weights the rewards or the effects are too small to compare."""


def try_all(only: Iterable[str] = ()) -> list[Trial]:
    """Every class once, by its model type."""
    classes: dict[str, Any] = {}
    for config, model in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.items():
        classes.setdefault(config.model_type, (config, model[0] if isinstance(model, tuple | list) else model))
    names = [name for name in sorted(classes) if not only or name in set(only)]
    return [try_one(name, *classes[name]) for name in names]


def try_one(name: str, config: Any, model: Any) -> Trial:
    """A class as a small PM. Its rewards and ablations are compared with plain forwards."""
    try:
        made = small(config, model)
    except Exception as error:  # whatever a class says to settings of another one
        return Trial(name, "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    ids = torch.tensor([[5, 6, 7, 8, EOS]])
    try:
        made(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        return Trial(
            name, "not built", f"its own forward fails, {type(error).__name__}: {' '.join(str(error).split())[:80]}"
        )
    encoder_decoder = bool(getattr(made.config, "is_encoder_decoder", False))
    try:
        rm = RewardModel(made, tokenizer(), Rendering("hh", append_eos=encoder_decoder), name)
        rewards, effects, is_stream = _difference_of_rewards(rm), _difference_of_effects(rm), _is_hidden_state(rm)
    except InputError as error:
        return Trial(name, "refused", str(error))
    except NothingMovesError as error:
        return Trial(name, "not judged", str(error))
    except Exception as error:  # a traceback is what a user would see
        return Trial(name, "wrong", f"{type(error).__name__}: {error}")
    c = rm.capabilities
    ways = {
        "packed": c.packing, "resumed": c.resume, "ragged": c.ragged, "later blocks": c.skipping and not c.resume,
        "whole": not (c.skipping or c.resume), "each text alone": not c.mixing,
    }  # fmt: skip
    how = ", ".join(way for way, is_taken in ways.items() if is_taken)
    if is_stream is False:
        return Trial(name, "wrong", f"{how}; the stream at {SITE} is none of the model's hidden states")
    told = "" if is_stream else "; the model tells no hidden states"
    verdict = "agrees" if max(rewards, effects) < EQUAL else "wrong"
    return Trial(name, verdict, f"{how} ({rewards:.0e}, {effects:.0e}){told}")


def small(config_class: Any, model_class: Any) -> Any:
    """A random model of a class, as small as its config lets it be. ValueError where that is not small."""
    config = config_class()
    for one in _nested(config):
        for name in {**one.to_dict(), **getattr(one, "attribute_map", {})}:
            if name in SETTINGS:
                setattr(one, name, SETTINGS[name])
            elif name.endswith(DROPOUT) and isinstance(getattr(one, name, None), float):
                setattr(one, name, 0.0)
        if hasattr(one, "kv_lora_rank"):
            one.num_key_value_heads = HEADS
        if types := getattr(one, "layer_types", None):
            with suppress(AttributeError):  # some give them by a rule
                one.layer_types = (list(dict.fromkeys(types)) * BLOCKS)[:BLOCKS]
    config.num_labels = 1
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = PAD
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "emb" in name or "wte" in name else 1.5 / p.shape[-1] ** 0.5, generator=generator)
    return model


def _nested(config: Any) -> list[Any]:
    """A config and those inside it, the innermost first."""
    inner = [v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig)]
    return [*(each for one in inner for each in _nested(one)), config]


@torch.no_grad()
def _difference_of_rewards(rm: RewardModel) -> float:
    """The largest, in SD(r), between scores in batches and the model's own forward on each text alone."""
    scores = rm.score(PAIRS)
    own = torch.tensor([[float(rm.own_outputs(rm.tokenize(p).side(side))[0]) for side in SIDES] for p in PAIRS])
    found = torch.stack([scores.chosen, scores.rejected], 1)
    if own.std() < SMALLEST:
        raise NothingMovesError(f"with random weights its rewards hardly vary (SD {float(own.std()):.0e})")
    worst = float((found - own).abs().max() / own.std())
    return worst if math.isfinite(worst) else math.inf


def _difference_of_effects(rm: RewardModel) -> float:
    """The largest, in SD(r), between exact ablations and forwards with the stream edited by a plain hook."""
    sae, tokens, differences, sizes = small_sae(rm.d_model), rm.tokenize(PAIRS[0]), list[float](), list[float]()
    wanted: Mapping[int, Any] = {0: {side: {SITE: None} for side in SIDES}}
    spread = float(rm.score(PAIRS).chosen.std())
    for _, found in ablations(rm, {SITE: sae}, [tokens], wanted):
        ids, read = tokens.side(found.side), rm.read_positions(tokens)[found.side]
        clean = _own_reward(rm, sae, ids, tokens.divergence, read, None)
        for place in range(0, found.feature.numel(), 8):
            without = _own_reward(rm, sae, ids, tokens.divergence, read, int(found.feature[place]))
            differences.append(abs(clean - without - float(found.effect[place])))
            sizes.append(abs(clean - without))
    if max(sizes, default=0.0) < SMALLEST * spread:
        raise NothingMovesError(f"with random weights no ablation moves its reward (at most {max(sizes, default=0.0):.0e})")
    return max(differences) / spread if all(map(math.isfinite, differences)) else math.inf


@torch.no_grad()
def _is_hidden_state(rm: RewardModel) -> bool | None:
    """Whether the stream at the site is one of the hidden states that the model itself tells; None where it tells none."""
    tokens = rm.tokenize(PAIRS[0])
    batch = pad_texts([(0, "chosen", tokens.chosen, 1, rm.read_positions(tokens)["chosen"])], rm.pad_id)
    try:
        out = rm.model(**rm.inputs(batch), output_hidden_states=True)
    except TypeError:  # its forward has no such option
        return None
    names = ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
    told = [h for name in names for h in getattr(out, name, None) or () if isinstance(h, Tensor)]
    x = rm.streams(batch, [SITE])[SITE]
    told = [h for h in told if h.shape == x.shape]
    return any(torch.allclose(h, x, rtol=1e-4, atol=1e-4) for h in told) if told else None


@torch.no_grad()
def _own_reward(rm: RewardModel, sae: Sae, ids: Tensor, start: int, read: int, feature: int | None) -> float:
    """r of one text by the class's own forward, with a plain hook on the block that takes a feature out of the span."""

    def edit(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (output if isinstance(output, Tensor) else output[0]).clone()
        if feature is not None:
            f = sae.encode(x[0, start : read + 1].float())[:, feature]
            x[0, start : read + 1] -= (f[:, None] * sae.W_dec[feature]).to(x)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    hook = rm.blocks[int(SITE.partition(".")[2])].register_forward_hook(edit)
    try:
        return float(rm.reward_of(rm.own_outputs(ids)[None])[0])
    finally:
        hook.remove()


def page(trials: Iterable[Trial]) -> str:
    """The table of docs/reference/architectures.md."""
    trials = list(trials)
    counts = Counter(t.verdict for t in trials)
    judged = len(trials) - counts["not built"] - counts["not judged"]
    rows = [
        "# Architectures that were tried",
        "",
        "`python -m tests.model.every_architecture` writes this page. It builds every sequence-classification class of",
        f"transformers {transformers.__version__} as a small random PM of {BLOCKS} blocks, scores pairs in batches, and",
        "ablates features of an SAE. Rewards are compared with the model's own forward on each text alone, effects with",
        f"forwards whose stream is edited by a plain hook. Equal means within {EQUAL:g} SD(r). The two figures in brackets",
        "are the largest differences of rewards and of effects. The stream must also be one of the hidden states that the",
        "model itself gives. Not judged is what random weights leave without rewards or effects to compare.",
        "",
        f"Of {len(trials)} classes {judged} could be judged: {counts['agrees']} agree, {counts['refused']} are",
        f"refused, {counts['wrong']} are wrong. What is refused can be scored, but has no single residual stream to ablate.",
        "",
        "*Packed*: both texts of a pair share a row and their prompt. *Resumed*: an ablation runs only the blocks and",
        "tokens after its site. *Ragged*: ablations that begin at different tokens share a row. *Later blocks*: an ablation",
        "runs only the blocks after its site, on the whole text. *Whole*: an ablation is a full forward pass. *Each text",
        "alone*: padding changes its reward.",
        "",
        "| architecture | verdict | how, or why not |",
        "|---|---|---|",
        *(f"| {t.architecture} | {t.verdict} | {_cell(t.how)} |" for t in trials),
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split())[:200].replace("|", "/").replace("<", "&lt;").replace("`", "'")


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    trials = try_all(sys.argv[1:])
    if sys.argv[1:]:
        print("\n".join(f"{t.architecture:22s} {t.verdict:10s} {t.how[:180]}" for t in trials))
    else:
        PAGE.write_text(page(trials), "utf-8")


if __name__ == "__main__":
    main()
