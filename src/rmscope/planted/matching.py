"""Which reported features match a planted cue (docs/method.md, Planted bias, has the rule).

A cue is measured on twins: one response with the cue, in wordings that the PM never saw, and with filler of equal length.
Their prompts had no part in training SAEs, selecting features or confirming them. Half of the prompts fit (which features,
which threshold), the other half measures. A group is grown greedily by exact joint ablation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import get_args

import numpy as np
from jaxtyping import Float

from rmscope.model.reward_model import RewardModel
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.results import Candidate, Candidates, CueEffect, CueMatch, GroupMatch, Hit, Match
from rmscope.planted.twins import Peaks, Prepared, Twin, halves, localises, matched_groups, mediation, scaled_peaks
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, interval, ratio

F1, MASS, MEDIATED, GROUP_MEDIATED, SIGN = 0.8, 0.5, 0.2, 0.4, 0.9
GROUP = 5
TRIED = 8
"""Candidates for a group at a site: those that alone mediate most on the fitting half."""
SPOIL = 0.02
"""How much F1 on the fitting half a further member of a group may cost."""
CONTROLS = 16
"""Matched groups; a hit mediates more than any of them."""
TIE = 1e-3
"""Shares that differ by less are the same: rounding alone may differ by as much."""
LEARNED, NULL = 0.25, 0.10
"""|ATE| in SD(Δr): at least this is learned; an interval within this is a clean null."""


def match_plant(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Prepared,
    reported: Candidates,
    sd: float,
    groups: bool = False,
) -> CueMatch:
    """The cue's ATE, whether it was learned, and its best match among the reported features.

    Args:
        prepared: the plant's twins, from :func:`rmscope.planted.twins.prepare`.
        reported: the best reported features of each site.
        sd: SD(Δr) over the dataset.
        groups: also grow a group beside a single hit. ``group`` is then that of the site where it mediates most on the
            fitting half, if it is a hit.
    """
    effect = cue_effect(plant, next(iter(prepared.values())), sd)
    sites = [_AtSite(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    tried, group = [at.single() for at in sites], None
    if groups or not any(match.found for match in tried):
        grown = [at.group() for at in sites]
        fitted = max(grown, key=lambda g: g[1] if g[0].found else -np.inf)[0]
        if fitted.found:
            group = GroupMatch(**fitted.model_dump(include=set(GroupMatch.model_fields)))
        tried = [match for match in tried if match.found] + [match for match, _ in grown]
    best = max(tried, key=lambda match: (get_args(Hit).index(match.hit), match.share))
    if not best.found and not effect.learned:
        best = best.model_copy(update={"why": "not learned"})
    return CueMatch(**dict(effect), **dict(best), group=group)


def matches(rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, prepared: Prepared, reported: Candidates) -> bool:
    """Whether :func:`match_plant` finds a match.

    It is faster: no group is grown where none could detect the cue, which takes most of the time of a miss.
    """
    sites = [_AtSite(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    return any(at.single().found for at in sites) or any(at.group()[0].found for at in sites if at.detectable())


def cue_effect(plant: Plant, twins: Sequence[Twin], sd: float) -> CueEffect:
    """A cue's ATE on the PM and that of its words alone; whether the cue was learned, is a clean null, or neither."""
    ate = interval([t.delta for t in twins], [t.prompt for t in twins])
    alone = [(t.negative.reward - t.responses["rejected"].text.reward, t.prompt) for t in twins if t.negative]
    value, low, high = ate.value or 0.0, ate.low or 0.0, ate.high or 0.0
    same_sign = (low > 0) == (high > 0) and np.sign(value) == plant.sign
    return CueEffect(
        **plant.model_dump(include={"name", "kind", "sign"}),
        ate=ate,
        words_alone=interval([reward for reward, _ in alone], [prompt for _, prompt in alone]) if alone else None,
        learned=bool(same_sign and abs(value) >= LEARNED * sd),
        null=max(abs(low), abs(high)) <= NULL * sd,
    )


def mediated_share(rows: Float[Array, "twins 2"], prompts: Sequence[str]) -> Figure:
    """1 - ATE without the group / ATE, with its interval; ``rows`` holds each twin's Δr as it is and without the group."""
    return ratio(rows[:, 0] - rows[:, 1], rows[:, 0], prompts)


def threshold(cue: Array, without: Array) -> tuple[float, float]:
    """(best F1 of "peak > θ", θ) on peaks with and without the cue; θ is the middle of the widest gap that gives it."""
    levels = np.unique(np.r_[0.0, cue, without])
    scores = np.array([f1_score(cue, without, t) for t in levels[:-1]])
    if not scores.size:
        return 0.0, 0.0
    gaps = np.where(scores == scores.max(), np.diff(levels), -1.0)
    widest = int(gaps.argmax())
    return float(scores.max()), float(levels[widest] + gaps[widest] / 2)


def f1_score(cue: Array, without: Array, theta: float) -> float:
    """F1 of "peak > θ" as a detector of the cue."""
    hits, false = (cue > theta).sum(), (without > theta).sum()
    return float(2 * hits / max(1, hits + false + cue.size))


def held_out_f1(fitting: Peaks, measuring: Peaks) -> float:
    """F1 on the measuring half at the threshold of the fitting half."""
    return f1_score(*measuring, threshold(*fitting)[1])


class _AtSite:
    """A plant at a site: its twins, the candidates (reported features of the planted sign), their peaks on both halves, and
    what each alone mediates on the fitting half, the largest first."""

    def __init__(
        self, rm: RewardModel, sae: Sae, site: str, plant: Plant, twins: Sequence[Twin], reported: Sequence[Candidate]
    ) -> None:
        self.rm, self.sae, self.site, self.lexical = rm, sae, site, plant.kind in LEXICAL
        self.fitting, self.measuring = halves(twins)
        self.candidates = {c.feature: c for c in reported if np.sign(c.mean_effect) == plant.sign}
        by_feature = scaled_peaks(twins, list(dict.fromkeys(self.features(self.candidates))), sae.m)
        self.peaks = [{j: _union(peaks, c.features) for j, c in self.candidates.items()} for peaks in by_feature]
        alone = dict(zip(self.candidates, self.shares(self.fitting, [[j] for j in self.candidates]), strict=True))
        self.alone = {j: alone[j] for j in sorted(alone, key=lambda j: -alone[j]) if alone[j] > 0}

    def features(self, group: Iterable[int]) -> list[int]:
        """The features of some candidates."""
        return [j for candidate in group for j in self.candidates[candidate].features]

    def shares(self, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
        """The share that each group of candidates mediates on these twins."""
        return self._shares(twins, [self.features(group) for group in groups])

    def _shares(self, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
        rows = mediation(self.rm, self.sae, self.site, twins, groups).mean(1)
        return (1 - rows[:, 1] / rows[:, 0]).tolist()

    def single(self) -> Match:
        """The single feature that mediates most on the fitting half, if it is a hit on the measuring half."""
        alone = (j for j in self.alone if len(self.candidates[j].features) == 1)
        constant = (j for j in alone if self.candidates[j].sign_consistency >= SIGN)
        if (best := next((j for j in constant if self.detects([j]) >= F1), None)) is None:
            return Match()
        local = localises(self.measuring, self.candidates[best].features[0]) if self.lexical else None
        one, f1, low = self.measure([best])
        enough = f1 >= F1 and low >= MEDIATED and (local is None or local >= MASS)
        if enough and (matched := self.matched([best])) < one.share - TIE:
            return one.model_copy(update={"found": True, "hit": "single", "localises": local, "matched": matched})
        return Match()

    def group(self) -> tuple[Match, float]:
        """The group grown on the fitting half, measured on the other, and the share that it mediates on the fitting half."""
        if not self.candidates:
            return Match(site=self.site, why="no reported feature has the planted sign"), 0.0
        grown, fitted = self.grow()
        tried = grown or list(self.candidates)[:1]
        group, f1, _ = self.measure(tried)
        if f1 < F1:
            told: dict[str, object] = {"why": "no reported feature detects it"}
        elif group.share < GROUP_MEDIATED:
            told = {"why": f"the features that detect it carry {round(group.share, 2) + 0.0:.0%} of its effect"}
        elif (matched := self.matched(tried)) >= group.share - TIE:
            told = {"why": "matched features carry as much of its effect", "matched": matched}
        else:
            told = {"found": True, "hit": "group", "matched": matched}
        return group.model_copy(update=told), fitted

    def measure(self, group: list[int]) -> tuple[Match, float, float]:
        """A group on the measuring half: as an attempt, its F1, and the lower bound of its mediated share."""
        features = self.features(group)
        rows = mediation(self.rm, self.sae, self.site, self.measuring, [features])[0]
        mediated = mediated_share(rows, [t.prompt for t in self.measuring])
        f1 = held_out_f1(*(_union(peaks, group) for peaks in self.peaks))
        by_rank = sorted((self.candidates[j] for j in group), key=lambda c: c.rank)
        rank, effect = by_rank[-1].rank, by_rank[0].mean_effect
        concepts = [j for j in group if self.candidates[j].members]
        match = Match(
            site=self.site, features=features, concepts=concepts, rank=rank, effect=effect, f1=f1, mediated=mediated
        )
        return match, f1, mediated.low or 0.0

    def matched(self, group: list[int]) -> float:
        """The largest share that any of :data:`CONTROLS` matched groups mediates on the measuring half."""
        groups = matched_groups(self.sae, self.measuring, self.features(group), CONTROLS)
        return max(0.0, *self._shares(self.measuring, groups))

    def grow(self) -> tuple[list[int], float]:
        """A group grown greedily by exact joint ablation on the fitting half, and the share that it mediates there."""
        group, share = list[int](), 0.0
        while len(group) < GROUP:
            larger = [[*group, j] for j in list(self.alone)[:TRIED] if j not in group]
            detects = [self.detects(g) for g in larger]
            least = (self.detects(group) if group else max(detects, default=0.0)) - SPOIL
            able = [g for g, f1 in zip(larger, detects, strict=True) if f1 >= least]
            shares = self.shares(self.fitting, able)
            if max(shares, default=0.0) <= share:
                break
            share = max(shares)
            group = able[shares.index(share)]
        return group, share

    def detectable(self) -> bool:
        """Whether any group that :meth:`grow` may give detects the cue on the measuring half, as a hit must."""
        able = list(self.alone)[:TRIED] or list(self.candidates)[:1]
        groups = (group for size in range(1, GROUP + 1) for group in combinations(able, size))
        return any(held_out_f1(*(_union(peaks, group) for peaks in self.peaks)) >= F1 for group in groups)

    def detects(self, group: Sequence[int]) -> float:
        """The best F1 of a group's union on the fitting half."""
        return threshold(*_union(self.peaks[0], group))[0]


def _union(peaks: Mapping[int, Peaks], group: Sequence[int]) -> Peaks:
    """A group's peaks with the cue and without it: the largest of its features'."""
    cue, without = (np.max([peaks[j][k] for j in group], axis=0) for k in (0, 1))
    return cue, without
