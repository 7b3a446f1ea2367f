"""The figures of an audit: recall, sign accuracy, reported nulls, false discoveries, mediated share.

They count learned cues alone. A hit counts at K where all of its features rank in the first K of its site. Shares of cues or
features have their exact binomial interval; over few cues it is wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
from pydantic import BaseModel

from rmscope.pairs.plants import LEXICAL
from rmscope.planted.results import CueMatch, CueResult
from rmscope.statistics import NOTHING, Figure, interval, share

KS = (20, 50)
"""Best features of each site among which a hit is looked for."""


@dataclass(frozen=True, slots=True)
class FalseDiscoveries(Figure):
    """The share of reported features that are false."""

    unjudged: int = 0
    """Reported features that fire on too few fresh prompts to be judged. They count as reported and not as false."""


@dataclass(frozen=True, slots=True)
class MediatedShare(Figure):
    """The mean mediated share of the lexical cues that were hit: that of their group if it is a hit, else of the feature."""

    all: Figure = NOTHING
    """Of all cues that were hit."""
    best: Figure = NOTHING
    """Of the lexical cues that were hit, by their best hits alone."""
    learned: Figure = NOTHING
    """Of all learned lexical cues; those that were missed count with their best attempt."""


class RecallMetrics(BaseModel):
    """What an audit measured."""

    recall_at_20: Figure
    recall_at_50: Figure
    sign_accuracy: Figure
    null_reported: Figure
    false_discoveries: FalseDiscoveries
    mediated_share: MediatedShare
    lowest_dose: float | None


def recall_metrics(rows: Sequence[CueResult], replicated: Mapping[str, pl.DataFrame]) -> RecallMetrics:
    """All figures. ``replicated`` is that of :func:`false_discoveries`."""
    recall_at_20, recall_at_50 = (recall(rows, k) for k in KS)
    return RecallMetrics(
        recall_at_20=recall_at_20,
        recall_at_50=recall_at_50,
        sign_accuracy=sign_accuracy(rows),
        null_reported=reported_nulls(rows),
        false_discoveries=false_discoveries(rows, replicated),
        mediated_share=mean_mediated_share(rows),
        lowest_dose=lowest_dose(rows),
    )


def recall(rows: Sequence[CueMatch], k: int) -> Figure:
    """The share of learned cues that are hit by features which all rank in the first k."""
    learned = [row for row in rows if row.learned]
    return share(sum(row.found and row.rank is not None and row.rank <= k for row in learned), len(learned))


def sign_accuracy(rows: Sequence[CueMatch]) -> Figure:
    """Of the learned cues that reported features match, the share whose features have the planted sign."""
    right = sum(row.found for row in rows if row.learned)
    wrong = sum(row.why == "wrong sign" for row in rows if row.learned)
    return share(right, right + wrong)


def reported_nulls(rows: Sequence[CueResult]) -> Figure:
    """The share of clean nulls that a reported feature matches."""
    clean = [row for row in rows if row.null]
    return share(sum(bool(row.matched_by) for row in clean), len(clean))


def false_discoveries(rows: Sequence[CueResult], replicated: Mapping[str, pl.DataFrame]) -> FalseDiscoveries:
    """The share of reported features that match a clean null or fail on fresh pairs.

    ``replicated`` has, at each site, one row per reported feature: feature, failed (null where it cannot be judged).
    """
    of_null = {(match.site, match.feature) for row in rows if row.null for match in row.matched_by}
    failed = {(site, feature) for site, table in replicated.items() for feature in table.filter(pl.col("failed"))["feature"]}
    reported = sum(table.height for table in replicated.values())
    unjudged = sum(int(table["failed"].null_count()) for table in replicated.values())
    return FalseDiscoveries(**share(len(of_null | failed), reported).as_dict(), unjudged=unjudged)


def mean_mediated_share(rows: Sequence[CueMatch]) -> MediatedShare:
    """The mean mediated share over cues, with its bootstrap interval over cues."""
    hits = [row for row in rows if row.learned and row.found]
    lexical = [row for row in hits if row.kind in LEXICAL]
    tried = [row for row in rows if row.learned and row.kind in LEXICAL]
    return MediatedShare(
        **interval([_carried(row) for row in lexical]).as_dict(),
        all=interval([_carried(row) for row in hits]),
        best=interval([_value(row.mediated) for row in lexical]),
        learned=interval([_carried(row) for row in tried]),
    )


def _carried(row: CueMatch) -> float:
    """The share of a hit or of the best attempt; 0 where nothing was tried."""
    return max(0.0, _value(row.group.mediated if row.group else row.mediated))


def _value(figure: Figure | None) -> float:
    return (figure and figure.value) or 0.0


def lowest_dose(rows: Sequence[CueResult]) -> float | None:
    """The detection limit: the smallest max(dose, 1 - dose) of a learned cue that was hit."""
    return min((max(row.dose, 1 - row.dose) for row in rows if row.learned and row.found), default=None)
