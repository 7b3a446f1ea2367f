"""Which reported features match a planted cue (docs/method.md, Planted bias, has the rule).

A cue is measured on twins: one response with the cue, in wordings that the PM never saw, and with filler of equal length.
Their prompts had no part in training SAEs, selecting features or confirming them. Half of the prompts fit (which features,
which threshold), the other half measures. A group is grown greedily by exact joint ablation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from rmscope.effects.across import Members
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.results import Candidate, Candidates, CueEffect, CueMatch, GroupMatch, Match
from rmscope.planted.twins import Peaks, Prepared, Twin, halves, localises, matched_groups, mediation, scaled_peaks
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, interval, ratio

F1, MASS, MEDIATED, GROUP_MEDIATED, SIGN = 0.8, 0.5, 0.2, 0.4, 0.9
GROUP = 5
TRIED, DETECTORS = 8, 4
"""Candidates for a group, of those that are specific to the cue: those that alone mediate most on the fitting half, and
those that alone detect best there."""
PRECISION, OFTEN = 0.8, 0.2
"""Of the windows in which a member of a group fires above its own threshold, the share that must hold the cue; and the share
of the cue's windows in which it must fire. What fires elsewhere may carry the cue's effect, as it carries that of others,
but does not tell of the cue."""
SPOIL = 0.02
"""How much F1 on the fitting half a further member of a group may cost."""
CONTROLS = 16
"""Matched groups; a hit mediates more than any of them, by the lower end of its interval."""
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
        groups: also grow a group beside a single hit; ``group`` is then that group, if it is a hit.
    """
    effect = cue_effect(plant, next(iter(prepared.values())), sd)
    pool = _Pool(rm, saes, plant, prepared, reported)
    best, group = pool.single(), None
    if groups or not best.found:
        grown = pool.group()
        if grown.found:
            group = GroupMatch(**grown.model_dump(include=set(GroupMatch.model_fields)))
        best = best if best.found else grown
    if not best.found and not effect.learned:
        best = best.model_copy(update={"why": "not learned"})
    return CueMatch(**dict(effect), **dict(best), group=group)


def matches(rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, prepared: Prepared, reported: Candidates) -> bool:
    """Whether :func:`match_plant` finds a match.

    It is faster: no group is grown where none could detect the cue, which takes most of the time of a miss.
    """
    pool = _Pool(rm, saes, plant, prepared, reported)
    return pool.single().found or (pool.detectable() and pool.group().found)


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


def is_specific(cue: Array, without: Array) -> bool:
    """Whether a candidate may be in a group, by its peaks at its best threshold."""
    theta = threshold(cue, without)[1]
    hits, false = (cue > theta).sum(), (without > theta).sum()
    return bool(hits >= OFTEN * cue.size and hits >= PRECISION * (hits + false) and hits)


def held_out_f1(fitting: Peaks, measuring: Peaks) -> float:
    """F1 on the measuring half at the threshold of the fitting half."""
    return f1_score(*measuring, threshold(*fitting)[1])


Key = tuple[str, int]
"""A candidate: the site at which it is listed, and its number."""


class _Pool:
    """Candidates for a plant, from all sites: those of the planted sign, their peaks on both halves of the twins, and what
    each alone mediates on the fitting half, the largest first."""

    def __init__(
        self,
        rm: RewardModel,
        saes: Mapping[str, Sae],
        plant: Plant,
        prepared: Prepared,
        reported: Candidates,
    ) -> None:
        self.rm, self.saes, self.lexical = rm, saes, plant.kind in LEXICAL
        both = {site: halves(twins) for site, twins in prepared.items()}
        self.fitting, self.measuring = ({site: of[half] for site, of in both.items()} for half in (0, 1))
        signed = {site: [c for c in listed if np.sign(c.mean_effect) == plant.sign] for site, listed in reported.items()}
        self.candidates: dict[Key, Candidate] = {(site, c.feature): c for site, of in signed.items() for c in of}
        self.members = {key: c.at(key[0]) for key, c in self.candidates.items()}
        self.peaks: list[dict[Key, Peaks]] = [{}, {}]
        for site in prepared:
            here = {key: members[site] for key, members in self.members.items() if key[0] == site}
            by_feature = scaled_peaks(prepared[site], list(dict.fromkeys(chain(*here.values()))), saes[site].m)
            for own, peaks in zip(self.peaks, by_feature, strict=True):
                own.update({key: union(peaks, features) for key, features in here.items()})
        alone = dict(zip(self.members, self.shares(self.fitting, [[key] for key in self.members]), strict=True))
        self.alone = {key: alone[key] for key in sorted(alone, key=lambda key: -alone[key]) if alone[key] > 0}

    @cached_property
    def tried(self) -> list[Key]:
        """The candidates for a group."""
        specific = [key for key in self.alone if is_specific(*self.peaks[0][key])]
        detectors = sorted(specific, key=lambda key: -self.detects([key]))
        return list(dict.fromkeys([*specific[:TRIED], *detectors[:DETECTORS]]))

    def features(self, group: Iterable[Key]) -> dict[str, list[int]]:
        """The features of some candidates by site, that of the first candidate first."""
        by_site: dict[str, list[int]] = {}
        for candidate in group:
            for site, features in self.members[candidate].items():
                by_site.setdefault(site, []).extend(features)
        return by_site

    def shares(self, twins: Prepared, groups: Sequence[Sequence[Key]]) -> list[float]:
        """The share that each group of candidates mediates on these twins."""
        return self._shares(twins, [self.features(group) for group in groups])

    def _shares(self, twins: Prepared, groups: Sequence[Members]) -> list[float]:
        rows = mediation(self.rm, self.saes, twins, groups).mean(1)
        return (1 - rows[:, 1] / rows[:, 0]).tolist()

    def single(self) -> Match:
        """The single feature that mediates most on the fitting half, if it is a hit on the measuring half."""
        alone = (j for j in self.alone if sum(map(len, self.members[j].values())) == 1)
        constant = (j for j in alone if self.candidates[j].sign_consistency >= SIGN)
        if (best := next((j for j in constant if self.detects([j]) >= F1), None)) is None:
            return Match()
        ((site, (feature,)),) = self.members[best].items()
        local = localises(self.measuring[site], feature) if self.lexical else None
        one, f1, low = self.measure([best])
        enough = f1 >= F1 and low >= MEDIATED and (local is None or local >= MASS)
        if enough and (matched := self.matched([best])) < low - TIE:
            return one.model_copy(update={"found": True, "hit": "single", "localises": local, "matched": matched})
        return Match()

    def group(self) -> Match:
        """The group grown on the fitting half, measured on the other."""
        if not self.candidates:
            return Match(why="no reported feature has the planted sign")
        tried = self.grow() or list(self.candidates)[:1]
        group, f1, low = self.measure(tried)
        if f1 < F1:
            told: dict[str, object] = {"why": "no reported feature detects it"}
        elif group.share < GROUP_MEDIATED:
            told = {"why": f"the features that detect it carry {round(group.share, 2) + 0.0:.0%} of its effect"}
        elif (matched := self.matched(tried)) >= low - TIE:
            told = {"why": "matched features carry as much of its effect", "matched": matched}
        else:
            told = {"found": True, "hit": "group", "matched": matched}
        return group.model_copy(update=told)

    def measure(self, group: list[Key]) -> tuple[Match, float, float]:
        """A group on the measuring half: as an attempt, its F1, and the lower bound of its mediated share."""
        by_rank = sorted((self.candidates[j] for j in group), key=lambda c: c.rank)
        features = self.features(group)
        rows = mediation(self.rm, self.saes, self.measuring, [features])[0]
        mediated = mediated_share(rows, [t.prompt for t in next(iter(self.measuring.values()))])
        f1 = held_out_f1(*(union(peaks, group) for peaks in self.peaks))
        (site, own), *others = features.items()
        rank, effect = by_rank[-1].rank, by_rank[0].mean_effect
        concepts = [key[1] for key in group if self.candidates[key].members]
        match = Match(
            site=site,
            features=own,
            elsewhere=dict(others),
            concepts=concepts,
            rank=rank,
            effect=effect,
            f1=f1,
            mediated=mediated,
        )
        return match, f1, mediated.low or 0.0

    def matched(self, group: list[Key]) -> float:
        """The largest share that any of :data:`CONTROLS` matched groups mediates on the measuring half."""
        controls: list[dict[str, list[int]]] = [{} for _ in range(CONTROLS)]
        for site, features in self.features(group).items():
            matched = matched_groups(self.saes[site], self.measuring[site], features, CONTROLS)
            for control, of_site in zip(controls, matched, strict=True):
                control[site] = of_site
        return max(0.0, *self._shares(self.measuring, controls))

    def grow(self) -> list[Key]:
        """A group grown greedily by exact joint ablation on the fitting half."""
        group, share = list[Key](), 0.0
        while len(group) < GROUP:
            larger = [[*group, key] for key in self.tried if key not in group]
            detects = [self.detects(g) for g in larger]
            least = (self.detects(group) if group else max(detects, default=0.0)) - SPOIL
            able = [g for g, f1 in zip(larger, detects, strict=True) if f1 >= least]
            shares = self.shares(self.fitting, able)
            if max(shares, default=0.0) <= share:
                break
            share = max(shares)
            group = able[shares.index(share)]
        return group

    def detectable(self) -> bool:
        """Whether any group that :meth:`grow` may give detects the cue on the measuring half, as a hit must."""
        able = self.tried or list(self.candidates)[:1]
        groups = (group for size in range(1, GROUP + 1) for group in combinations(able, size))
        return any(held_out_f1(*(union(peaks, group) for peaks in self.peaks)) >= F1 for group in groups)

    def detects(self, group: Sequence[Key]) -> float:
        """The best F1 of a group's union on the fitting half."""
        return threshold(*union(self.peaks[0], group))[0]


def union(peaks: Mapping[Any, Peaks], group: Sequence[Any]) -> Peaks:
    """A group's peaks with the cue and without it: the largest of its features'."""
    cue, without = (np.max([peaks[j][k] for j in group], axis=0) for k in (0, 1))
    return cue, without
