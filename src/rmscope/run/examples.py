"""Examples of a feature: pairs on which it was ablated exactly, with its activations and the rewards around it.

They come from the confirm split, which had no part in choosing the feature: the three largest effects and the median one, so
that a reader sees the typical case beside the striking ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.run.data import RunData
from rmscope.run.evidence import Context, Side
from rmscope.sae.base import Sae

LARGEST = 3
"""Examples of largest |effect|; the median one comes beside them."""


@dataclass(frozen=True, slots=True)
class Example:
    """One pair for one feature: the pair's place and the exact effect on each side (0 where silent)."""

    feature: int
    pair: int
    effect: dict[str, float]


def contexts(run: RunData, site: str, feature: int) -> list[Context]:
    """All confirm pairs on which a feature was ablated, those of largest |effect| first."""
    exact = run.confirmed(site).filter(pl.col("feature") == feature)
    order = by_size(exact)
    return contexts_of(run, site, [_example(exact, feature, pair, run.pair_set.index) for pair in order])


def choose_examples(exact: pl.DataFrame, features: Sequence[int], index: Mapping[str, int]) -> list[Example]:
    """Of each feature's confirmed ablations the pairs with the three largest |effects|, and the median one."""
    examples: list[Example] = []
    for feature in features:
        part = exact.filter(pl.col("feature") == feature)
        order = by_size(part)
        picked = order[:LARGEST] + ([order[len(order) // 2]] if len(order) > 2 * LARGEST else [])
        examples += [_example(part, feature, pair, index) for pair in picked]
    return examples


def by_size(exact: pl.DataFrame) -> list[str]:
    """Pair ids, the largest |effect| first."""
    sized = exact.with_columns(pl.col("effect").abs().alias("size")).sort(["size", "pair"], descending=[True, False])
    return sized["pair"].unique(maintain_order=True).to_list()


def _example(exact: pl.DataFrame, feature: int, pair: str, index: Mapping[str, int]) -> Example:
    effects = dict(exact.filter(pl.col("pair") == pair).select("side", "effect").iter_rows())
    return Example(feature, index[pair], {s: float(effects.get(s, 0.0)) for s in SIDES})


def contexts_of(run: RunData, site: str, examples: Sequence[Example]) -> list[Context]:
    """The examples with activations on every token of the span, and rewards before and after."""
    f = activations(run.rm, run.saes[site], site, run.tokens, examples)
    rewards = {row["pair"]: row for row in run.scores.select("pair", *SIDES).iter_rows(named=True)}
    return [_context(run, e, rewards[run.ids[e.pair]], {s: f[e.feature, e.pair, s] for s in SIDES}) for e in examples]


def activations(
    rm: RewardModel, sae: Sae, site: str, tokens: Sequence[PairTokens], examples: Sequence[Example]
) -> dict[tuple[int, int, str], Tensor]:
    """f_tj [span] of every example's sides, by (feature, pair, side)."""
    wanted: dict[int, list[int]] = {}
    for e in examples:
        wanted.setdefault(e.pair, []).append(e.feature)
    values: dict[tuple[int, int, str], Tensor] = {}
    pairs = sorted(wanted)
    for batch in rm.batches([tokens[p] for p in pairs]):
        stream = rm.streams(batch, [site])[site]
        for text in batch.texts:
            pair = pairs[text.pair]
            f = sae.encode(stream[text.row, text.span.to(stream.device)].float().cpu())
            for feature in wanted[pair]:
                values[feature, pair, text.side] = f[:, feature].clone()
    return values


def token_texts(rm: RewardModel, ids: Tensor) -> list[str]:
    """Each token as text. Joined, they read like the response (a character cut in two shows as one mark)."""
    return [rm.tokenizer.decode([int(i)]) for i in ids]


def _context(run: RunData, example: Example, rewards: Mapping[str, float], f: Mapping[str, Tensor]) -> Context:
    pair, tokens, effect = run.pairs[example.pair], run.tokens[example.pair], example.effect
    top = max(float(f[s].max()) if f[s].numel() else 0.0 for s in SIDES)
    sides = []
    for side in SIDES:
        span = tokens.side(side)[tokens.divergence : tokens.divergence + f[side].numel()]
        level = (f[side] / top if top > 0 else torch.zeros_like(f[side])).tolist()
        sides.append(
            Side(
                side=side,
                tokens=[(text, round(v, 3)) for text, v in zip(token_texts(run.rm, span), level, strict=True)],
                before=rewards[side],
                after=rewards[side] - effect[side],
                fires=bool((f[side] > 0).any()),
            )
        )
    delta = rewards["chosen"] - rewards["rejected"]
    return Context(
        prompt=pair.prompt[-1]["content"],
        delta_before=delta,
        delta_after=delta - effect["chosen"] + effect["rejected"],
        sides=sides,
    )
