"""The figures of an audit from its rows: recall, sign accuracy, nulls, false discoveries, mediated share.

Counted over learned cues alone; a hit counts at K where all of its features rank in the first K of its site.
Shares of cues or features carry their exact binomial interval; over few cues it is wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.pairs.plants import LEXICAL
from rmscope.sae.base import Sae
from rmscope.statistics import mean_interval, share_interval

KS = (20, 50)
COSINE = 0.7
"""A feature is found again by another SAE where both decoder and encoder have a cosine as large as this."""


def share(hits: int, n: int) -> dict[str, Any]:
    """hits of n with its interval; value None where there is nothing to count."""
    low, high = share_interval(hits, n)
    return {"value": hits / n if n else None, "low": low, "high": high, "hits": hits, "n": n}


def recall(rows: Sequence[Mapping[str, Any]], k: int) -> dict[str, Any]:
    """The share of learned cues that are hit by features which all rank in the first k."""
    learned = [row for row in rows if row["learned"]]
    return share(sum(bool(row["found"]) and row["rank"] <= k for row in learned), len(learned))


def sign_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the learned cues that reported features match, the share whose features have the planted sign."""
    right = sum(bool(row["found"]) for row in rows if row["learned"])
    wrong = sum(row["why"] == "wrong sign" for row in rows if row["learned"])
    return share(right, right + wrong)


def nulls_reported(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of clean nulls that a reported feature matches."""
    clean = [row for row in rows if row["null"]]
    return share(sum(bool(row["matched_by"]) for row in clean), len(clean))


def false_discoveries(rows: Sequence[Mapping[str, Any]], replicated: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    """The share of reported features that match a clean null or fail on fresh pairs.

    ``replicated`` holds a row a reported feature at each site: feature, failed. Features that fire on too few fresh prompts
    to be judged (failed is null) count among the reported, not as false; ``unjudged`` says how many they are.
    """
    of_null = {(m["site"], m["feature"]) for row in rows if row["null"] for m in row["matched_by"]}
    failed = {(site, feature) for site, table in replicated.items() for feature in table.filter(pl.col("failed"))["feature"]}
    reported = sum(table.height for table in replicated.values())
    unjudged = sum(int(table["failed"].null_count()) for table in replicated.values())
    return share(len(of_null | failed), reported) | {"unjudged": unjudged}


def mediated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean mediated share of the lexical cues that were hit, of their group where one hits, else of the single feature;
    ``all`` that of all cues that were hit, ``best`` that of their best hits alone, ``learned`` that of all lexical cues that
    were learned, with what was tried for those that were missed. Bootstrap over cues."""
    hits = [row for row in rows if row["learned"] and row["found"]]
    lexical = [row for row in hits if row["kind"] in LEXICAL]
    best = _mean([row["mediated"]["value"] for row in lexical])
    tried = [row for row in rows if row["learned"] and row["kind"] in LEXICAL]
    return _mean([_carried(row) for row in lexical]) | {
        "all": _mean([_carried(row) for row in hits]), "best": best, "learned": _mean([_carried(row) for row in tried])
    }  # fmt: skip


def _carried(row: Mapping[str, Any]) -> float:
    """Of a hit or of what was tried; 0 where nothing was."""
    return max(0.0, float(((row["group"] or row)["mediated"] or {"value": 0.0})["value"]))


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = mean_interval(np.array(values))
    return {"value": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def cosines(sae: Sae, other: Sae, features: Sequence[int]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Cosines of each of ``features`` with every feature of ``other``, of the decoders and of the encoders."""

    def between(mine: Tensor, theirs: Tensor) -> Tensor:
        rows, columns = (torch.nn.functional.normalize(w, dim=1) for w in (mine[list(features)], theirs))
        return rows @ columns.t()

    return between(sae.W_dec, other.W_dec), between(sae.W_enc.t(), other.W_enc.t())


def found_again(sae: Sae, other: Sae, features: Sequence[int]) -> list[bool]:
    """Whether some feature of ``other`` is like each of ``features``, in decoder and in encoder."""
    return (torch.minimum(*cosines(sae, other, features)) >= COSINE).any(1).tolist()


def lowest_dose(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The detection limit: the smallest max(dose, 1 - dose) of a learned cue that was hit."""
    return min((max(row["dose"], 1 - row["dose"]) for row in rows if row["learned"] and row["found"]), default=None)


def summary(rows: Sequence[Mapping[str, Any]], replicated: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    """The figures that the last line of ``rmscope audit --json`` holds."""
    return {
        **{f"recall_at_{k}": recall(rows, k) for k in KS},
        "sign_accuracy": sign_accuracy(rows),
        "null_reported": nulls_reported(rows),
        "false_discoveries": false_discoveries(rows, replicated),
        "mediated_share": mediated(rows),
        "lowest_dose": lowest_dose(rows),
    }
