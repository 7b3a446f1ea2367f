"""What is known of a planted cue: its effect on the PM, the features that match it, and why there are none.

Effects are in units of reward. Shares are of the cue's effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from rmscope.pairs.plants import Kind
from rmscope.statistics import Figure

Hit = Literal["none", "group", "single"]
"""Whether a cue is matched, by a group of features or by a single one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feature that may match a cue."""

    feature: int
    rank: int
    """Its place among the site's reported features, similar ones counted once."""
    mean_effect: float
    sign_consistency: float
    """The share of its ablations that have the sign of its mean effect."""
    flags: tuple[str, ...] = ()


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


class Match(Row):
    """The best match of a cue at a site, or the best attempt at one."""

    found: bool = False
    hit: Hit = "none"
    site: str | None = None
    features: list[int] = []
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


class GroupMatch(Row):
    """A group of features that matches a cue, beside a single feature that does."""

    site: str
    features: list[int]
    f1: float
    mediated: Figure
    matched: float


class CueMatch(Match, CueEffect):
    """One row of the ground truth: a cue's effect, and its best match."""

    group: GroupMatch | None = None


class NullMatch(Row):
    """A reported feature that matches a clean null."""

    site: str
    feature: int
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
    """Reported features that match it, where it is a null."""
    detail: str = ""
    """What the best attempt lacked."""
    planted: PlantedCounts | None = None
