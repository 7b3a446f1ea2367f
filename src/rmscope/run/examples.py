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


def contexts(run: RunData, site: str, feature: int) -> list[Context]:
    """All confirm pairs on which a feature was ablated, those of largest |effect| first."""
    own = by_size(run.confirmed(site).filter(pl.col("feature") == feature))
    return contexts_of(run, [Examples(site, own)])[0]


def by_size(exact: pl.DataFrame) -> pl.DataFrame:
    """One row per feature and pair: the effect on each side (0 where silent); of each feature the largest |effect| first."""
    sides = [pl.col("effect").filter(pl.col("side") == side).sum().alias(side) for side in SIDES]
    table = exact.group_by("feature", "pair").agg(*sides, pl.col("effect").abs().max().alias("size"))
    return table.sort("feature", "size", "pair", descending=[False, True, False])


def choose_examples(exact: pl.DataFrame) -> pl.DataFrame:
    """Of each feature's confirmed ablations the pairs with the three largest |effects|, and the median one."""
    place, n = pl.int_range(pl.len()).over("feature"), pl.len().over("feature")
    return by_size(exact).filter((place < LARGEST) | ((n > 2 * LARGEST) & (place == n // 2)))


@dataclass(frozen=True, slots=True)
class Examples:
    """Pairs to show: of features of a site, or of concepts at home there.

    ``table`` has the columns feature (or a concept's number), pair, chosen and rejected (the effect on each side). Of
    concepts, ``weights`` gives the features of each with their weights.
    """

    site: str
    table: pl.DataFrame
    weights: Mapping[int, Mapping[int, float]] | None = None

    def features_of(self, number: int) -> Mapping[int, float]:
        return {number: 1.0} if self.weights is None else self.weights[number]


def contexts_of(run: RunData, wanted: Sequence[Examples]) -> list[list[Context]]:
    """For each of ``wanted`` its examples, with activations on every token of the span and rewards before and after.

    The PM runs once over all pairs that any of them needs.
    """
    index, rewards = run.pair_set.index, {row["pair"]: row for row in run.scores.iter_rows(named=True)}
    f = activations(run.rm, run.saes, run.tokens, index, wanted)
    contexts = list[list[Context]]()
    for number, one in enumerate(wanted):
        contexts.append([])
        for e in one.table.iter_rows(named=True):
            active: dict[str, Tensor] = {side: f[number, e["feature"], e["pair"], side] for side in SIDES}
            contexts[-1].append(_context(run, index[e["pair"]], e, rewards[e["pair"]], active))
    return contexts


def activations(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    index: Mapping[str, int],
    wanted: Sequence[Examples],
) -> dict[tuple[int, int, str, str], Tensor]:
    """Σ_j w_j f_tj [span] of both sides of each example, by (place in ``wanted``, feature or concept, pair, side)."""
    by_pair: dict[str, list[tuple[int, int]]] = {}
    for number, one in enumerate(wanted):
        for feature, pair in one.table.select("feature", "pair").iter_rows():
            by_pair.setdefault(pair, []).append((number, feature))
    pairs = sorted(by_pair, key=index.__getitem__)
    sites = list(dict.fromkeys(one.site for one in wanted))
    values: dict[tuple[int, int, str, str], Tensor] = {}
    for batch in rm.batches([tokens[index[p]] for p in pairs]):
        streams = rm.streams(batch, sites)
        for text in batch.texts:
            pair = pairs[text.pair]
            f = {}
            for site in {wanted[number].site for number, _ in by_pair[pair]}:
                span = text.span.to(streams[site].device)
                f[site] = saes[site].encode(streams[site][text.row, span].float().cpu())
            for number, feature in by_pair[pair]:
                of = wanted[number].features_of(feature)
                active = f[wanted[number].site][:, list(of)]
                values[number, feature, pair, text.side] = active @ torch.tensor(list(of.values()))
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
        pair=pair.id,
        prompt=pair.prompt[-1]["content"],
        delta_before=delta,
        delta_after=delta - effect["chosen"] + effect["rejected"],
        sides=sides,
    )
