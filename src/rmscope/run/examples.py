"""Examples of a feature: pairs on which it was ablated exactly, with its activations and the rewards around it.

They come from the confirm split, which had no part in choosing the feature: the three largest effects and the median one, so
that a reader sees the typical case beside the striking ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def contexts(run: RunData, site: str, feature: int) -> list[Context]:
    """All confirm pairs on which a feature was ablated, those of largest |effect| first."""
    return contexts_of(run, site, by_size(run.confirmed(site).filter(pl.col("feature") == feature)))


def by_size(exact: pl.DataFrame) -> pl.DataFrame:
    """One row per feature and pair: the effect on each side (0 where silent); of each feature the largest |effect| first."""
    sides = [pl.col("effect").filter(pl.col("side") == side).sum().alias(side) for side in SIDES]
    table = exact.group_by("feature", "pair").agg(*sides, pl.col("effect").abs().max().alias("size"))
    return table.sort("feature", "size", "pair", descending=[False, True, False])


def choose_examples(exact: pl.DataFrame) -> pl.DataFrame:
    """Of each feature's confirmed ablations the pairs with the three largest |effects|, and the median one."""
    place, n = pl.int_range(pl.len()).over("feature"), pl.len().over("feature")
    return by_size(exact).filter((place < LARGEST) | ((n > 2 * LARGEST) & (place == n // 2)))


def contexts_of(
    run: RunData, site: str, examples: pl.DataFrame, weights: Mapping[int, Mapping[int, float]] | None = None
) -> list[Context]:
    """The examples with activations on every token of the span, and rewards before and after.

    ``weights`` gives the features of each concept with their weights, where the examples are of concepts.
    """
    index, rewards = run.pair_set.index, {row["pair"]: row for row in run.scores.iter_rows(named=True)}
    f = activations(
        run.rm, run.saes[site], site, run.tokens, [(e["feature"], index[e["pair"]]) for e in examples.to_dicts()], weights
    )
    return [
        _context(run, index[e["pair"]], e, rewards[e["pair"]], {s: f[e["feature"], index[e["pair"]], s] for s in SIDES})
        for e in examples.iter_rows(named=True)
    ]


def activations(
    rm: RewardModel,
    sae: Sae,
    site: str,
    tokens: Sequence[PairTokens],
    examples: Sequence[tuple[int, int]],
    weights: Mapping[int, Mapping[int, float]] | None = None,
) -> dict[tuple[int, int, str], Tensor]:
    """f_tj [span] of both sides of the examples (feature, pair), by (feature, pair, side); of concepts, Σ_j w_j f_tj."""
    wanted: dict[int, list[int]] = {}
    for feature, pair in examples:
        wanted.setdefault(pair, []).append(feature)
    values: dict[tuple[int, int, str], Tensor] = {}
    pairs = sorted(wanted)
    for batch in rm.batches([tokens[p] for p in pairs]):
        stream = rm.streams(batch, [site])[site]
        for text in batch.texts:
            pair = pairs[text.pair]
            f = sae.encode(stream[text.row, text.span.to(stream.device)].float().cpu())
            for feature in wanted[pair]:
                own = {feature: 1.0} if weights is None else weights[feature]
                values[feature, pair, text.side] = f[:, list(own)] @ torch.tensor(list(own.values()))
    return values


def token_texts(rm: RewardModel, ids: Tensor) -> list[str]:
    """Each token as text. Joined, they read like the response (a character cut in two shows as one mark)."""
    return [rm.tokenizer.decode([int(i)]) for i in ids]


def _context(
    run: RunData, place: int, effect: Mapping[str, float], rewards: Mapping[str, float], f: Mapping[str, Tensor]
) -> Context:
    pair, tokens = run.pairs[place], run.tokens[place]
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
