"""The pairs of a run: which ones the list shows, and the ledger of one over its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.app.bench import Bench
from rmscope.app.catalogue import Listed, parameters
from rmscope.app.library import ScoredPair
from rmscope.pairs.pair import SIDES, Pair
from rmscope.run.data import RunData
from rmscope.run.examples import token_texts
from rmscope.sae.base import Active

SORTS = {"data": "as in the data", "size": "largest |Δr|", "up": "largest Δr", "down": "smallest Δr"}
PARTS = ("features", "error", "constant", "remainder", "gap")


@dataclass(frozen=True, slots=True)
class PairQuery:
    """Which pairs are asked for. An empty value selects everything, an unknown split nothing."""

    text: str = ""
    """Part of a turn, of a response or of the id."""
    split: str = ""
    sort: str = "data"
    page: str = "1"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> PairQuery:
        """From the parameters of an address; others are left out."""
        return cls(**parameters(cls, given, SORTS))


def find_pairs(pairs: Iterable[ScoredPair], query: PairQuery) -> Listed[ScoredPair]:
    """The pairs that match, in the order that is asked for; a page that is not there is the nearest one."""
    text = query.text.casefold()
    rows = [row for row in pairs if (not query.split or row.split == query.split) and (not text or _holds(row.pair, text))]
    if query.sort != "data":
        key = {"size": lambda row: -abs(row.delta), "up": lambda row: -row.delta, "down": lambda row: row.delta}
        rows.sort(key=key[query.sort])
    return Listed.page_of(rows, query.page)


def _holds(pair: Pair, text: str) -> bool:
    texts = (pair.id, *(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected)
    return any(text in part.casefold() for part in texts)


def ledgers_of(run: RunData, pair: str) -> list[dict[str, Any]]:
    """The stored ledger of a pair at each site that has one: site, delta_r, its parts, closed."""
    tables = ((site, run.ledger(site).filter(pl.col("pair") == pair)) for site in run.sites)
    return [{"site": site, **row} for site, table in tables for row in table.to_dicts()]


@dataclass(frozen=True, slots=True)
class LedgerStrip:
    """A side's tokens on the pair's span, each with its part of the contributions of features that fire."""

    side: str
    tokens: list[str]
    contributions: list[float]


def ledger_strips(run: RunData, bench: Bench, pair: Pair, site: str) -> list[LedgerStrip]:
    """The stored contributions of a pair's features at a site over the tokens, both sides."""
    stored, strips = run.effects(site, "contribution").filter(pl.col("pair") == pair.id), list[LedgerStrip]()
    for side, clean in zip(SIDES, bench.clean_pair(pair), strict=True):
        response = clean.responses[site]
        effects = dict(stored.filter(pl.col("side") == side).select("feature", "effect").iter_rows())
        tokens = token_texts(bench.rm, clean.run.ids[response.start :])
        strips.append(LedgerStrip(side, tokens, over_tokens(response.active, effects).tolist()))
    return strips


def over_tokens(active: Active, contributions: Mapping[int, float]) -> Float[Tensor, " tokens"]:
    """Contributions of features over the tokens of a span: each feature's is split in proportion to its activation. The
    contribution of a feature that is silent is on no token."""
    features, place = torch.unique(active.feature, return_inverse=True)
    total = torch.zeros(len(features)).index_add_(0, place, active.value)
    whole = torch.tensor([contributions.get(j, 0.0) for j in features.tolist()])
    return torch.zeros(active.n_tokens).index_add_(0, active.token, (whole / total)[place] * active.value)


def reach_of(strips: Sequence[LedgerStrip]) -> float:
    """The largest |contribution| of a token: full colour."""
    return max((abs(value) for strip in strips for value in strip.contributions), default=0.0) or 1.0
