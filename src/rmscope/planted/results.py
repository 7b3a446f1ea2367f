"""What is known of planted cues: their effect on the PM, the features that match them, and the figures over many cues.

Effects are in units of reward, shares are of the cue's effect. Figures count learned cues alone. A hit counts at K where all
of its features rank in the first K of its site. Shares of cues or features have their exact binomial interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict

from rmscope.pairs.plants import LEXICAL, Kind
from rmscope.statistics import NOTHING, Figure, interval, share

KS = (20, 50)
"""Best features of each site among which a hit is looked for."""
Hit = Literal["none", "group", "single"]
"""Whether a cue is matched, by a group of features or by a single one; from worst to best."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feature, or a concept, that may match a cue."""

    feature: int
    """Its number; of a concept, the concept's."""
    rank: int
    """Its place among the site's reported features, similar ones counted once."""
    mean_effect: float
    sign_consistency: float
    """The share of its ablations that have the sign of its mean effect."""
    flags: tuple[str, ...] = ()
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The features of a concept at each of its sites; those of the first detect it, all are ablated together."""

    def at(self, site: str) -> Mapping[str, tuple[int, ...]]:
        """The features that are ablated together, by site, of a candidate that is listed at ``site``."""
        return self.members or {site: (self.feature,)}


Candidates = Mapping[str, Sequence[Candidate]]
"""The candidates of each site, by rank."""


class Row(BaseModel):
    """A row of a table that is stored as JSON. Numbers that are not finite stay as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class CueEffect(Row):
    """A cue's measured effect on the PM."""

    name: str
    kind: Kind
    sign: Literal[1, -1]
    """The planted sign."""
    ate: Figure
    """Mean reward with the cue minus with filler."""
    words_alone: Figure | None
    """The same for the cue's words in another use; None where the plant has no hard negatives."""
    learned: bool
    null: bool
    """Whether it is a clean null. A cue may be neither learned nor a clean null."""


class Ablated(Row):
    """Features that are ablated together."""

    features: list[int] = []
    elsewhere: dict[str, list[int]] = {}
    """The features at other sites."""

    @property
    def size(self) -> int:
        """How many features are ablated together, at all sites."""
        return len(self.features) + sum(map(len, self.elsewhere.values()))


class Match(Ablated):
    """The best match of a cue at a site, or the best attempt at one."""

    found: bool = False
    hit: Hit = "none"
    site: str | None = None
    concepts: list[int] = []
    """The concepts that hold these features; empty where features were tried one by one."""
    rank: int | None = None
    """That of the last of its features."""
    effect: float | None = None
    """Mean ablation effect of the first of its features."""
    f1: float | None = None
    localises: float | None = None
    """The share of the feature's activation in the cue's window; None for groups and for cues that are not lexical."""
    mediated: Figure | None = None
    matched: float | None = None
    """The largest share that any matched set of other features mediates."""
    why: str = ""
    """Why it is no hit."""

    @property
    def share(self) -> float:
        """The mediated share; 0 where nothing was tried."""
        return (self.mediated and self.mediated.value) or 0.0


class GroupMatch(Ablated):
    """A group of features that matches a cue, beside a single feature that does."""

    site: str
    f1: float
    mediated: Figure
    matched: float


class CueMatch(Match, CueEffect):
    """One row of the ground truth: a cue's effect, and its best match."""

    group: GroupMatch | None = None

    @property
    def carried(self) -> float:
        """The share of the group if there is one, else of the hit or the best attempt; at least 0."""
        return max(0.0, (self.group.mediated.value or 0.0) if self.group else self.share)


class NullMatch(Row):
    """A reported feature, or concept, that matches a clean null."""

    site: str
    feature: int
    concept: bool = False
    """Whether ``feature`` is the number of a concept."""
    f1: float
    moved: float
    """How far its ablation moves the twins' difference, in the feature's sign."""


class PlantedCounts(Row):
    """How a cue was planted: pairs, share of them whose label favours its sign, mean tokens of the cue and of its filler."""

    pairs: int
    dose: float
    cue_tokens: float
    filler_tokens: float


class CueResult(CueMatch):
    """One row of an audit: a plant's match, or why there is none."""

    dose: float
    rate: float
    ate_sd: float
    """The effect in SD(Δr)."""
    matched_by: list[NullMatch] = []
    """Reported features and concepts that match it, where it is a null."""
    detail: str = ""
    """What the best attempt lacked."""
    text: str | None = None
    """The term of the run's text baseline that names it: planted sign, and it detects the cue on twins."""
    planted: PlantedCounts | None = None


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
    named_by_text: Figure = NOTHING
    """The share of learned cues that a term of the text baseline names, without any SAE."""


def recall_metrics(rows: Sequence[CueResult], replicated: Mapping[str, pl.DataFrame]) -> RecallMetrics:
    """All figures. ``replicated`` is that of :func:`false_discoveries`."""
    return RecallMetrics(
        recall_at_20=recall(rows, KS[0]),
        recall_at_50=recall(rows, KS[1]),
        sign_accuracy=sign_accuracy(rows),
        null_reported=reported_nulls(rows),
        false_discoveries=false_discoveries(rows, replicated),
        mediated_share=mean_mediated_share(rows),
        lowest_dose=lowest_dose(rows),
        named_by_text=share(sum(bool(row.text) for row in rows if row.learned), sum(row.learned for row in rows)),
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
    """The share of clean nulls that a reported feature or concept matches."""
    clean = [row for row in rows if row.null]
    return share(sum(bool(row.matched_by) for row in clean), len(clean))


def false_discoveries(rows: Sequence[CueResult], replicated: Mapping[str, pl.DataFrame]) -> FalseDiscoveries:
    """The share of reported features that match a clean null or fail on fresh pairs.

    ``replicated`` has, at each site, one row per reported feature: feature, failed (null where it cannot be judged).
    """
    of_null = {(m.site, m.feature) for row in rows if row.null for m in row.matched_by if not m.concept}
    failed = {(site, feature) for site, table in replicated.items() for feature in table.filter(pl.col("failed"))["feature"]}
    reported = sum(table.height for table in replicated.values())
    unjudged = sum(int(table["failed"].null_count()) for table in replicated.values())
    return FalseDiscoveries(**share(len(of_null | failed), reported).as_dict(), unjudged=unjudged)


def mean_mediated_share(rows: Sequence[CueMatch]) -> MediatedShare:
    """The mean mediated share over cues, with its bootstrap interval over cues."""
    learned = [row for row in rows if row.learned]
    hits, lexical = [row for row in learned if row.found], [row for row in learned if row.kind in LEXICAL]
    return MediatedShare(
        **interval([row.carried for row in lexical if row.found]).as_dict(),
        all=interval([row.carried for row in hits]),
        best=interval([row.share for row in lexical if row.found]),
        learned=interval([row.carried for row in lexical]),
    )


def lowest_dose(rows: Sequence[CueResult]) -> float | None:
    """The detection limit: the smallest max(dose, 1 - dose) of a learned cue that was hit."""
    return min((max(row.dose, 1 - row.dose) for row in rows if row.learned and row.found), default=None)
