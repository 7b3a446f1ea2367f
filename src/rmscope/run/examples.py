"""Dossiers: for a feature, responses on which it was ablated exactly, with its activations and the rewards around it.

Examples come from the confirm split, which had no part in choosing the feature: the three largest effects and the
median one, so that a reader sees the typical case beside the striking ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from rmscope.model.packing import Batch
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae

LARGEST = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One pair for one feature: the pair's index and the exact effect on each side (0 where silent)."""

    feature: int
    pair: int
    effect: dict[str, float]


def choose_examples(exact: pl.DataFrame, features: Sequence[int], index: Mapping[str, int]) -> list[Example]:
    """Of each feature's confirmed ablations the pairs with the three largest |effects|, and the median one."""
    examples: list[Example] = []
    for feature in features:
        part = exact.filter(pl.col("feature") == feature)
        order = (
            part.with_columns(pl.col("effect").abs().alias("size"))
            .sort(["size", "pair"], descending=[True, False])["pair"]
            .unique(maintain_order=True)
            .to_list()
        )
        picked = order[:LARGEST] + ([order[len(order) // 2]] if len(order) > 2 * LARGEST else [])
        for pair in picked:
            effects = dict(part.filter(pl.col("pair") == pair).select("side", "effect").iter_rows())
            examples.append(Example(feature, index[pair], {s: float(effects.get(s, 0.0)) for s in SIDES}))
    return examples


def activations_of(
    rm: RewardModel, sae: Sae, site: str, tokens: Sequence[PairTokens], examples: Sequence[Example]
) -> dict[tuple[int, int, str], Tensor]:
    """f_tj on the span of every example's sides, keyed by (feature, pair, side)."""
    wanted: dict[int, list[int]] = {}
    for e in examples:
        wanted.setdefault(e.pair, []).append(e.feature)
    found: dict[tuple[int, int, str], Tensor] = {}
    pairs = sorted(wanted)
    for batch in rm.batches([tokens[p] for p in pairs]):
        _collect(rm, sae, site, batch, pairs, wanted, found)
    return found


def _collect(
    rm: RewardModel,
    sae: Sae,
    site: str,
    batch: Batch,
    pairs: Sequence[int],
    wanted: Mapping[int, Sequence[int]],
    found: dict[tuple[int, int, str], Tensor],
) -> None:
    stream = rm.streams(batch, [site])[site]
    for text in batch.texts:
        pair = pairs[text.pair]
        f = sae.encode(stream[text.row, text.span.to(stream.device)].float().cpu())
        for feature in wanted[pair]:
            found[feature, pair, text.side] = f[:, feature].clone()


def token_texts(rm: RewardModel, ids: Tensor) -> list[str]:
    """Each token as text, such that the texts joined read like the response (a character cut in two shows as one mark)."""
    return [rm.tokenizer.decode([int(i)]) for i in ids]


def example_page(
    rm: RewardModel,
    example: Example,
    pair: Pair,
    tokens: PairTokens,
    rewards: Mapping[str, float],
    f: Mapping[str, Tensor],
) -> dict[str, Any]:
    """One example as the report shows it: prompt, both sides with activations in 0 .. 1, rewards before and after."""
    top = max(float(f[s].max()) if f[s].numel() else 0.0 for s in SIDES)
    sides = []
    for side in SIDES:
        span = tokens.side(side)[tokens.divergence : tokens.divergence + f[side].numel()]
        level = (f[side] / top if top > 0 else torch.zeros_like(f[side])).tolist()
        sides.append(
            {
                "side": side,
                "tokens": [[text, round(v, 3)] for text, v in zip(token_texts(rm, span), level, strict=True)],
                "before": rewards[side],
                "after": rewards[side] - example.effect[side],
                "fires": bool((f[side] > 0).any()),
            }
        )
    delta = rewards["chosen"] - rewards["rejected"]
    return {
        "prompt": pair.prompt[-1]["content"],
        "delta_before": delta,
        "delta_after": delta - example.effect["chosen"] + example.effect["rejected"],
        "sides": sides,
    }
