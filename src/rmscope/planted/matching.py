"""Which reported features match a planted cue.

A cue is measured on twins: one response with the cue, in wordings that the PM never saw, and with filler of equal length.
Their prompts had no part in training SAEs, selecting features or confirming them. Half of the prompts fit (which features,
which threshold), the other half measures.

A single feature is a hit when, on the measuring half, it

1. detects the cue among fillers and hard negatives (F1 of at least .8);
2. localises it, for lexical cues (half of its activation is in the cue's window);
3. causes its effect (mediated share with a lower bound of at least .2, and more than any of :data:`CONTROLS` matched
   features);
4. carries the planted sign.

A cue may be split over features. A group of at most five is grown greedily on the fitting half by exact joint ablation. It
is a hit when its union detects the cue and its joint ablation mediates at least .4, more than matched groups do. The rule
is defined in `docs/method.md`, Planted bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.results import Candidate, Candidates, CueEffect, CueMatch, GroupMatch, Hit, Match
from rmscope.planted.twins import Twin, halves, largest, localises, matched_groups, mediation, peaks
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
HITS = ("none", "group", "single")
"""From worst to best."""


def match_plant(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Candidates,
    sd: float,
    groups: bool = False,
) -> CueMatch:
    """The cue's ATE, whether it was learned, and its best match among the reported features.

    Args:
        prepared: the plant's twins at each site (:func:`rmscope.planted.twins.prepare`).
        reported: the best reported features of each site.
        sd: SD(Δr) over the dataset.
        groups: also grow a group beside a single hit. ``group`` is then that of the site where it mediates most on the
            fitting half, if it is a hit.
    """
    effect = cue_effect(plant, next(iter(prepared.values())), sd)
    sites = [_at_site(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    tried, group = [_single(rm, at, plant) for at in sites], None
    if groups or not any(match.found for match in tried):
        grown = [_group(rm, at) for at in sites]
        fitted = max((g for g in grown if g.match.found), key=lambda g: g.fitted, default=None)
        group = fitted and GroupMatch(**fitted.match.model_dump(include=set(GroupMatch.model_fields)))
        tried = [match for match in tried if match.found] + [g.match for g in grown]
    best = max(tried, key=lambda match: (HITS.index(match.hit), (match.mediated and match.mediated.value) or 0.0))
    if not best.found and not effect.learned:
        best = best.model_copy(update={"why": "not learned"})
    return CueMatch(**dict(effect), **dict(best), group=group)


def matches(
    rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, prepared: Mapping[str, list[Twin]], reported: Candidates
) -> bool:
    """Whether :func:`match_plant` finds a match.

    It is faster: no group is grown where none could detect the cue, which takes most of the time of a miss.
    """
    sites = [_at_site(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    if any(_single(rm, at, plant).found for at in sites):
        return True
    return any(_group(rm, at).match.found for at in sites if _detectable(at))


def cue_effect(plant: Plant, twins: Sequence[Twin], sd: float) -> CueEffect:
    """A cue's ATE on the PM and that of its words alone; whether the cue was learned, is a clean null, or neither."""
    prompts = [t.prompt for t in twins]
    ate = interval([t.delta for t in twins], prompts)
    alone = [(t.negative.reward - t.responses["rejected"].text.reward, t.prompt) for t in twins if t.negative]
    value, low, high = ate.value or 0.0, ate.low or 0.0, ate.high or 0.0
    same_sign = (low > 0) == (high > 0) and np.sign(value) == plant.sign
    return CueEffect(
        name=plant.name,
        kind=plant.kind,
        sign=plant.sign,
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


@dataclass(frozen=True, slots=True)
class _AtSite:
    """A plant at a site: its twins, and the reported features of the planted sign."""

    site: str
    sae: Sae
    fitting: list[Twin]
    measuring: list[Twin]
    info: dict[int, Candidate]
    """Each feature among the candidates."""
    scale: dict[int, float]
    """Each feature's largest activation on the fitting half."""
    share: dict[int, float]
    """What each feature alone mediates on the fitting half, the largest first."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A group with its figures from the measuring half."""

    site: str
    features: list[int]
    rank: int
    effect: float
    f1: float
    mediated: Figure

    @property
    def share(self) -> float:
        assert self.mediated.value is not None
        return self.mediated.value

    @property
    def low(self) -> float:
        assert self.mediated.low is not None
        return self.mediated.low

    def as_match(
        self, hit: Hit = "none", why: str = "", localises: float | None = None, matched: float | None = None
    ) -> Match:
        return Match(
            found=hit != "none",
            hit=hit,
            site=self.site,
            features=self.features,
            rank=self.rank,
            effect=self.effect,
            f1=self.f1,
            localises=localises,
            mediated=self.mediated,
            matched=matched,
            why=why,
        )


@dataclass(frozen=True, slots=True)
class _Grown:
    """The match of a group, and the share that the group mediates on the fitting half."""

    match: Match
    fitted: float = 0.0


def _at_site(
    rm: RewardModel, sae: Sae, site: str, plant: Plant, twins: list[Twin], reported: Sequence[Candidate]
) -> _AtSite:
    fitting, measuring = halves(twins)
    info = {c.feature: c for c in reported if np.sign(c.mean_effect) == plant.sign}
    scale = {j: max(largest(t, s, j) for t in fitting for s in SIDES) or 1.0 for j in info}
    alone = dict(zip(info, _shares(rm, sae, site, fitting, [[j] for j in info]), strict=True))
    share = {j: alone[j] for j in sorted(info, key=lambda j: -alone[j]) if alone[j] > 0}
    return _AtSite(site, sae, fitting, measuring, info, scale, share)


def _shares(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
    """The share that each group mediates on these twins."""
    rows = mediation(rm, sae, site, twins, groups).mean(1)
    return (1 - rows[:, 1] / rows[:, 0]).tolist()


def _single(rm: RewardModel, at: _AtSite, plant: Plant) -> Match:
    """The single feature that mediates most on the fitting half, if it is a hit on the measuring half."""
    able = (j for j in at.share if at.info[j].sign_consistency >= SIGN and _detects(at, [j]) >= F1)
    if (best := next(able, None)) is not None:
        local = localises(at.measuring, best) if plant.kind in LEXICAL else None
        one = _measure(rm, at, [best])
        enough = one.f1 >= F1 and one.low >= MEDIATED and (local is None or local >= MASS)
        if enough and (matched := _matched(rm, at, [best])) < one.share - TIE:
            return one.as_match("single", localises=local, matched=matched)
    return Match()


def _group(rm: RewardModel, at: _AtSite) -> _Grown:
    """The group grown on the fitting half, with its figures from the measuring half; where it is no hit, why."""
    if not at.info:
        return _Grown(Match(site=at.site, why="no reported feature has the planted sign"))
    features, fitted = _grow(rm, at)
    group = _measure(rm, at, features or list(at.info)[:1])
    if group.f1 < F1:
        match = group.as_match(why="no reported feature detects it")
    elif group.share < GROUP_MEDIATED:
        match = group.as_match(why=f"the features that detect it carry {round(group.share, 2) + 0.0:.0%} of its effect")
    elif (matched := _matched(rm, at, group.features)) >= group.share - TIE:
        match = group.as_match(why="matched features carry as much of its effect", matched=matched)
    else:
        match = group.as_match("group", matched=matched)
    return _Grown(match, fitted)


def _measure(rm: RewardModel, at: _AtSite, group: list[int]) -> _Measured:
    """A group on the measuring half: F1 at the fitting half's threshold, and its mediated share."""
    _, theta = threshold(*peaks(at.fitting, group, at.scale))
    rows = mediation(rm, at.sae, at.site, at.measuring, [group])[0]
    by_rank = sorted((at.info[j] for j in group), key=lambda c: c.rank)
    return _Measured(
        site=at.site,
        features=group,
        rank=by_rank[-1].rank,
        effect=by_rank[0].mean_effect,
        f1=f1_score(*peaks(at.measuring, group, at.scale), theta),
        mediated=mediated_share(rows, [t.prompt for t in at.measuring]),
    )


def _matched(rm: RewardModel, at: _AtSite, group: list[int]) -> float:
    """The largest share that any of :data:`CONTROLS` matched groups mediates on the measuring half."""
    groups = matched_groups(at.sae, at.measuring, group, CONTROLS)
    return max(0.0, *_shares(rm, at.sae, at.site, at.measuring, groups))


def _grow(rm: RewardModel, at: _AtSite) -> tuple[list[int], float]:
    """A group grown greedily by exact joint ablation on the fitting half, and the share that it mediates there.

    A new member may cost at most :data:`SPOIL` of the F1 of the union.
    """
    useful = list(at.share)[:TRIED]
    group, share = list[int](), 0.0
    while len(group) < GROUP:
        larger = [[*group, j] for j in useful if j not in group]
        detects = [_detects(at, g) for g in larger]
        least = (_detects(at, group) if group else max(detects, default=0.0)) - SPOIL
        able = [g for g, f1 in zip(larger, detects, strict=True) if f1 >= least]
        shares = _shares(rm, at.sae, at.site, at.fitting, able)
        if max(shares, default=0.0) <= share:
            break
        share = max(shares)
        group = able[shares.index(share)]
    return group, share


def _detectable(at: _AtSite) -> bool:
    """Whether any group that :func:`_grow` may give detects the cue on the measuring half, as a hit must."""
    able = list(at.share)[:TRIED] or list(at.info)[:1]
    fitting, measuring = ([peaks(half, [j], at.scale) for j in able] for half in (at.fitting, at.measuring))
    groups = (list(g) for size in range(1, GROUP + 1) for g in combinations(range(len(able)), size))
    return any(f1_score(*_union(measuring, g), threshold(*_union(fitting, g))[1]) >= F1 for g in groups)


def _union(each: Sequence[tuple[Array, Array]], group: Sequence[int]) -> tuple[Array, Array]:
    """A group's peaks with the cue and without it, from those of single features."""
    cue, without = (np.max([each[i][k] for i in group], axis=0) for k in (0, 1))
    return cue, without


def _detects(at: _AtSite, group: Sequence[int]) -> float:
    """The best F1 of a group's union on the fitting half."""
    return threshold(*peaks(at.fitting, group, at.scale))[0]
