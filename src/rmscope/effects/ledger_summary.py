"""What ledgers say: shares of Δr over a dataset and over groups of pairs, and one pair's features with their tokens.

The share of a part is Cov(part, Δr) / Var(Δr) (METHOD, "The ledger of a pair"); its interval a bootstrap by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int

from rmscope.effects.gradients import sum_by_feature
from rmscope.effects.ledger import SILENT, shares
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import bootstrap

PARTS = ("features", "error", "remainder", "gap")
FEWEST = 8
"""A group of fewer pairs gets no shares."""
TOKENS = 5


def share_rows(ledger: pl.DataFrame, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The share of each part with its 95 % interval; ``prompts`` holds each pair's prompt."""
    rows = ledger.select("delta_r", *PARTS).to_numpy()
    whole = shares(rows[:, 1:], rows[:, 0])
    table = []
    for i, part in enumerate(PARTS):
        low, high = bootstrap(rows, np.asarray(prompts), lambda v, i=i: float(shares(v[:, 1:], v[:, 0])[i]))  # type: ignore[misc]
        table.append({"part": part, "value": float(whole[i]), "low": low, "high": high})
    return table


def shares_by(ledger: pl.DataFrame, groups: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The shares within each group of pairs, by the group's name: group, pairs, part, value, low, high."""
    names, of_prompt = np.asarray(groups), np.asarray(prompts)
    table = []
    for name in sorted(set(groups)):
        inside = names == name
        if inside.sum() >= FEWEST:
            rows = share_rows(ledger.filter(pl.Series(inside)), of_prompt[inside].tolist())
            table += [{"group": name, "pairs": int(inside.sum()), **row} for row in rows]
    return table


def length_groups(difference: Int[np.ndarray, " pairs"]) -> list[str]:
    """Thirds of the pairs by tokens of chosen minus tokens of rejected, named by their range."""
    order = np.argsort(difference, kind="stable")
    third = np.empty(len(difference), dtype=int)
    third[order] = np.arange(len(difference)) * 3 // max(1, len(difference))
    ranges = {t: difference[third == t] for t in np.unique(third)}
    names = {t: f"{t + 1}: chosen longer by {d.min()} .. {d.max()} tokens" for t, d in ranges.items()}
    return [names[t] for t in third]


def pair_features(
    rm: RewardModel, sae: Sae, site: str, tokens: PairTokens, contribution: pl.DataFrame, top: int
) -> pl.DataFrame:
    """A pair's largest contributions on each side (``top`` each): side, feature, effect, activation, tokens.

    ``contribution`` holds the pair's rows; feature -1 stands for all silent features. ``activation`` is Σ_t f_tj, ``tokens``
    the texts on which the feature fires most, strongest first.
    """
    parts = []
    for side in SIDES:
        ids = tokens.side(side)
        batch = pad_texts([(0, side, ids, tokens.divergence, rm.read_position(ids))], 0)
        span = batch.texts[0].span
        active = sae.active(rm.streams(batch, [site])[site][0, span].float().cpu())
        feature, total = sum_by_feature(active, active.value)
        activation = dict(zip(feature.tolist(), total.tolist(), strict=True))
        mine = contribution.filter(pl.col("side") == side).sort(pl.col("effect").abs(), descending=True).head(top)
        texts = []
        for j in mine["feature"]:
            at = active.feature == j
            order = active.value[at].argsort(descending=True)[:TOKENS]
            fires = [rm.tokenizer.decode([int(ids[span[t]])]) for t in active.token[at][order]]
            texts.append("(silent features)" if j == SILENT else "|".join(fires))
        columns = [
            pl.Series("activation", [activation.get(j, 0.0) for j in mine["feature"]], dtype=pl.Float64),
            pl.Series("tokens", texts, dtype=pl.String),
        ]
        parts.append(mine.select("side", "feature", "effect").with_columns(columns))
    return pl.concat(parts)
