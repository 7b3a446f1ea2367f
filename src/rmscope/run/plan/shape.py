"""The sizes of a PM and of pairs, which are all that a plan needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rmscope.errors import InputError
from rmscope.io import local_path
from rmscope.model.blocks import Layer
from rmscope.model.loading import as_input_error, base_name
from rmscope.model.packing import packed_length
from rmscope.model.rendering import PairTokens, read_json
from rmscope.model.reward_model import NO_BASE, RewardModel
from rmscope.pairs.pair import filtered_count
from rmscope.run.inputs import PairSet
from rmscope.run.settings import RunConfig

SPLITS = {"fit": 0.5, "confirm": 0.25, "measure": 0.25}
"""The share of the prompts in each split."""
RECTANGLES = ("gptj", "bloom", "falcon")
"""Architectures whose ablations run in rectangles: their attention does not go through transformers' interface."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a PM, and of its base beside it."""

    blocks: int
    d: int
    attention: int
    """Width of the queries of a block: heads times their size."""
    block: float
    """Weights of a block that a token is multiplied with; of experts those that a token runs through."""
    weights: int
    """All weights of the PM."""
    first: int | None = None
    """The first block that preference training changed; None where no base is known."""
    base_weights: int = 0
    """Weights of the base that are not the PM's own: equal ones are held once."""
    resumes: bool = True
    """Whether a run can be resumed at a token; if not, each ablation runs the whole text."""
    ragged: bool = True
    """Whether many ablations share a row without padding."""
    skips: bool = True
    """Whether blocks up to a site need not run again."""

    @property
    def of_trained(self) -> int:
        """Blocks of the base that run beside the PM's own."""
        return 0 if self.first is None else self.blocks - self.first


def shape_of(rm: RewardModel, is_base_asked: bool = False) -> Shape:
    """The sizes of a loaded PM, and of its base, which is loaded for it where one is named.

    InputError where ``is_base_asked`` and the base cannot be used.
    """
    try:
        base = rm.base
    except InputError:
        if is_base_asked:
            raise
        base = None
    own = {p.data_ptr() for p in rm.model.parameters()}
    others = [] if base is None else [p for p in base.model.parameters() if p.data_ptr() not in own]
    can = rm.capabilities
    first = None if base is None else base.first
    found = _shape(rm.model, list(rm.blocks), rm.text_config, can.resume, can.ragged, first, sum(p.numel() for p in others))
    return replace(found, skips=can.skipping)


def shape_from_config(config: RunConfig) -> Shape:
    """The sizes of a PM from its config.json alone: it is built on the meta device, without weights.

    Where a base is named, training is taken to have changed all of it; with an adapter, the blocks from the first that the
    adapter changes.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source, named = config.model, config.base or base_name(config.model, config.adapter, config.revision)
    adapter = local_path(config.adapter or source) / "adapter_config.json"
    if not config.adapter and adapter.is_file() and not (local_path(source) / "config.json").is_file():
        source = named or source
    name = str(local_path(source)) if local_path(source).is_dir() else source
    with as_input_error(f"The PM {config.model}"), torch.device("meta"):
        options = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
        stated = AutoConfig.from_pretrained(name, **options)
        model = AutoModelForSequenceClassification.from_config(stated, trust_remote_code=config.trust_remote_code)
    text = model.config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers > 0]
    if not lists:
        raise InputError(f"The blocks of {config.model} are not to be found from its config.json; plan with its weights.")
    blocks = max(lists, key=lambda found: sum(p.numel() for block in found for p in block.parameters()))
    first = None if named in (None, NO_BASE) else 0
    if first is not None and adapter.is_file():
        changed = read_json(adapter).get("layers_to_transform") or 0
        first = changed if isinstance(changed, int) else min(changed)
    beside = 0 if first is None else sum(p.numel() for block in blocks[first:] for p in block.parameters())
    if first == 0 and not adapter.is_file():
        beside = sum(p.numel() for p in model.parameters())
    is_decoder = hasattr(model, "score")
    ragged = is_decoder and text.model_type not in RECTANGLES
    return _shape(model, blocks, text, is_decoder, ragged, first, beside)


def _shape(
    model: Any, blocks: Sequence[nn.Module], text: Any, resumes: bool, ragged: bool, first: int | None, beside: int
) -> Shape:
    if not blocks:
        raise InputError(f"{type(model).__name__} has no residual stream that can be studied; its pairs can only be scored.")
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    d = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0))
    size = int(getattr(text, "head_dim", 0) or d // heads)
    return Shape(
        blocks=len(blocks),
        d=d,
        attention=heads * size,
        block=sum(_met(name, p, text) for block in blocks for name, p in _own(block).named_parameters()) / len(blocks),
        weights=sum(p.numel() for p in model.parameters()),
        first=first,
        base_weights=beside,
        resumes=resumes,
        ragged=ragged,
    )


def _own(block: nn.Module) -> nn.Module:
    """The block that a layer runs, where several layers share one."""
    return block.shared[0] if isinstance(block, Layer) else block


def _met(name: str, p: torch.Tensor, text: Any) -> float:
    """The weights of a parameter that a token is multiplied with."""
    experts = int(getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0) or 0)
    chosen = int(getattr(text, "num_experts_per_tok", 0) or experts)
    return p.numel() * (chosen / experts if experts and "expert" in name and "shared" not in name else 1.0)


@dataclass(frozen=True)
class Lengths:
    """How many pairs there are, and how long they are on average, in tokens."""

    scored: int
    studied: int
    side: float
    """Of one side: prompt and response."""
    prefix: float
    """Of the prefix that both sides share, which runs once per pair."""
    fit: int
    """Studied pairs of each split."""
    confirm: int
    measure: int
    fit_prompts: int
    """Prompts of the fit split: their tokens are stored once."""

    @classmethod
    def of(cls, pairs: PairSet, config: RunConfig) -> Lengths:
        """Counted from tokens. Of a filter on |Δr| only the number is known before rewards are."""
        n, tokens = len(pairs.pairs), pairs.tokens
        studied = filtered_count(n, config.top_share, config.top_pairs)
        fit, confirm, measure = (round(len(pairs.of_split(s)) * studied / n) for s in ("fit", "confirm", "measure"))
        prompts = len({pairs.pairs[i].prompt_key for i in pairs.of_split("fit")})
        side, packed = _side(tokens), sum(packed_length(t) for t in tokens) / n
        return cls(n, studied, side, 2 * side - packed, fit, confirm, measure, min(prompts, fit))

    @classmethod
    def of_numbers(cls, config: RunConfig, pairs: int, side: float, shared: float) -> Lengths:
        """Of so many pairs, each with a prompt of its own."""
        n = min(pairs, config.limit or pairs)
        side = min(side, config.max_tokens or side)
        studied = filtered_count(n, config.top_share, config.top_pairs)
        fit, confirm, measure = (round(studied * share) for share in SPLITS.values())
        return cls(n, studied, side, side * shared, fit, confirm, measure, fit)

    def studying(self, pairs: int) -> Lengths:
        """The same where so many of the scored pairs are studied."""
        share = pairs / self.studied
        counts = {name: round(getattr(self, name) * share) for name in (*SPLITS, "fit_prompts")}
        return replace(self, studied=pairs, **counts)

    @property
    def packed(self) -> float:
        """Tokens of a pair in one row."""
        return 2 * self.side - self.prefix

    @property
    def span(self) -> float:
        """Tokens of a response."""
        return self.side - self.prefix

    @property
    def stored(self) -> float:
        """Tokens that a harvest stores."""
        return 2 * self.fit * self.span + self.fit_prompts * self.prefix


def _side(tokens: Sequence[PairTokens]) -> float:
    return sum(t.chosen.numel() + t.rejected.numel() for t in tokens) / (2 * len(tokens))
