"""Were the planted biases found? Each cue's measured effect on the PM, and whether reported features match it.

Cues are measured on twins: one response with the cue, in wordings that the PM never saw, and with filler of equal
length, on prompts of the measure split, which had no part in training SAEs, selecting features or confirming them. Half
of the prompts fit (which features, which threshold), the other half measures. A feature matches a cue (METHOD, "Planted
bias") when there it detects it among fillers and hard negatives (F1 >= .8), localises it (lexical cues: half its
activation lies in the cue's window), causes its effect (mediated share, lower bound >= .2 and more than any of
:data:`CONTROLS` matched features) and carries the planted sign: a hit of kind ``single``. A cue may be split over
features: a ``group`` of at most five, grown greedily on the fitting half by exact joint ablation, hits when its union
detects and its joint ablation mediates at least .4, and more than matched groups. Candidates are the best reported
features of each site, 20 in a report, without those flagged ``ending``. A hit's rank is that of its last feature, counted
after merging features that are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.twins import Twin, halves, largest, localises, matched_groups, mediation, peaks
from rmscope.sae.base import Sae
from rmscope.statistics import Array, bootstrap, ratio_interval

F1, MASS, MEDIATED, GROUP_MEDIATED, SIGN = 0.8, 0.5, 0.2, 0.4, 0.9
GROUP = 5
TRIED = 8
"""Candidates for a group at a site: those that alone mediate most on the fitting half."""
SPOIL = 0.02
"""How much F1 on the fitting half a further member of a group may cost."""
CONTROLS = 16
"""Matched groups that a hit's mediated share must beat."""
TIE = 1e-3
"""By more than this: shares that differ by rounding alone are the same."""
COSINE, JACCARD = 0.7, 0.5
"""Features with decoders or firings as alike as this count as one in a rank."""
LEARNED, NULL = 0.25, 0.10
"""|ATE| in SD(Δr): at least this is learned; an interval within this is a clean null."""


def match_plant(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Mapping[str, list[dict[str, Any]]],
    sd: float,
    groups: bool = False,
) -> dict[str, Any]:
    """A row of the ground-truth table: the cue's ATE, whether it was learned, its best match among the reported features.

    ``reported`` holds, per site, the best reported features (feature, rank, mean_effect, sign_consistency).
    With ``groups`` a group is grown beside a single hit too: ``group`` is that of the site where it mediates most on the
    fitting half, if it hits.
    """
    row = cue_effect(plant, next(iter(prepared.values())), sd) | {
        "found": False, "hit": "none", "site": None, "features": [], "rank": None, "effect": None,
        "f1": None, "localises": None, "mediated": None, "matched": None, "why": "",
        "group": None,
    }  # fmt: skip
    sites = [_at_site(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    tried = [_single(rm, at, plant) for at in sites]
    if groups or not any(r["found"] for r in tried):
        grown = [_group(rm, at) for at in sites]
        fitted = max((r for r in grown if r["found"]), key=lambda r: float(r["fitted"]), default=None)
        row["group"] = fitted and {n: fitted[n] for n in ("site", "features", "f1", "mediated", "matched")}
        tried = [r for r in tried if r["found"]] + [{n: v for n, v in r.items() if n != "fitted"} for r in grown]
    order = ("none", "group", "single")
    best = max(tried, key=lambda r: (order.index(r["hit"]), r["mediated"]["value"] if r["mediated"] else 0.0))
    row |= best
    if not row["found"]:
        row["why"] = "not learned" if not row["learned"] else row["why"]
    return row


def matches(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Mapping[str, list[dict[str, Any]]],
) -> bool:
    """Whether :func:`match_plant` finds anything, for whoever need not know what: no group is grown where none could detect
    the cue, which takes most of the time that a miss takes."""
    sites = [_at_site(rm, sae, site, plant, prepared[site], reported[site]) for site, sae in saes.items()]
    if any(_single(rm, at, plant)["found"] for at in sites):
        return True
    return any(_group(rm, at)["found"] for at in sites if _detectable(at))


def cue_effect(plant: Plant, twins: Sequence[Twin], sd: float) -> dict[str, Any]:
    """A cue's ATE on the PM, that of its words alone, and what it says: learned, a clean null, or neither (both False)."""
    ate = _mean([(t.delta, t.prompt) for t in twins])
    same_sign = (ate["low"] > 0) == (ate["high"] > 0) and np.sign(ate["value"]) == plant.sign
    words = [(t.negative.reward - t.responses["rejected"].text.reward, t.prompt) for t in twins if t.negative]
    return {
        "name": plant.name, "kind": plant.kind, "sign": plant.sign, "ate": ate,
        "words_alone": _mean(words) if words else None,
        "learned": bool(same_sign and abs(ate["value"]) >= LEARNED * sd),
        "null": max(abs(ate["low"]), abs(ate["high"])) <= NULL * sd,
    }  # fmt: skip


def _mean(rows: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Mean of (value, prompt) with its interval, bootstrap by prompt."""
    values, prompts = np.array([v for v, _ in rows]), np.array([p for _, p in rows])
    low, high = bootstrap(values, prompts, lambda v: float(v.mean()))
    return {"value": float(values.mean()), "low": low, "high": high}


def mediated_share(rows: Array, prompts: Sequence[str]) -> dict[str, float]:
    """1 - ATE without the group / ATE, a ratio of means over twins [twins, 2], bootstrap by prompt."""
    low, high = ratio_interval(rows[:, 0] - rows[:, 1], rows[:, 0], np.array(prompts))
    return {"value": float(1 - rows[:, 1].mean() / rows[:, 0].mean()), "low": low, "high": high}


def threshold(cue: Array, without: Array) -> tuple[float, float]:
    """(best F1 of "peak > θ", θ) on peaks with the cue and without it; θ in the middle of the widest gap that gives it."""
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


def merged_ranks(features: Sequence[int], W_dec: torch.Tensor, fires: Array) -> dict[int, int]:
    """Ranks of features [n], the best first, where one whose decoder (cosine) or whose firing tokens (Jaccard; ``fires``
    [tokens, n]) are like those of a better one shares its rank."""
    rows = torch.nn.functional.normalize(W_dec[list(features)], dim=1)
    cosine = (rows @ rows.t()).numpy()
    together = fires.T.astype(np.float64) @ fires
    each = together.diagonal()
    jaccard = together / np.maximum(each[:, None] + each[None] - together, 1)
    like = (cosine >= COSINE) | (jaccard >= JACCARD)
    ranks: dict[int, int] = {}
    heads: list[int] = []
    for i, feature in enumerate(features):
        head = next((place for place, h in enumerate(heads) if like[i, h]), None)
        if head is None:
            heads.append(i)
            head = len(heads) - 1
        ranks[feature] = head + 1
    return ranks


@dataclass(frozen=True, slots=True)
class _AtSite:
    """A plant at a site: its twins, and the reported features of the planted sign."""

    site: str
    sae: Sae
    fitting: list[Twin]
    measuring: list[Twin]
    info: dict[int, dict[str, Any]]
    """Each feature's row among the reported."""
    scale: dict[int, float]
    """Each feature's largest activation on the fitting half."""
    share: dict[int, float]
    """What each feature alone mediates on the fitting half, the largest first."""


def _at_site(
    rm: RewardModel,
    sae: Sae,
    site: str,
    plant: Plant,
    twins: list[Twin],
    reported: Sequence[dict[str, Any]],
) -> _AtSite:
    fitting, measuring = halves(twins)
    info = {int(row["feature"]): row for row in reported if np.sign(row["mean_effect"]) == plant.sign}
    scale = {j: max(largest(t, s, j) for t in fitting for s in SIDES) or 1.0 for j in info}
    alone = dict(zip(info, _shares(rm, sae, site, fitting, [[j] for j in info]), strict=True))
    share = {j: alone[j] for j in sorted(info, key=lambda j: -alone[j]) if alone[j] > 0}
    return _AtSite(site, sae, fitting, measuring, info, scale, share)


def _shares(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
    """The share that each group mediates on these twins."""
    rows = mediation(rm, sae, site, twins, groups).mean(1)
    return (1 - rows[:, 1] / rows[:, 0]).tolist()


def _single(rm: RewardModel, at: _AtSite, plant: Plant) -> dict[str, Any]:
    """The single feature that mediates most on the fitting half, with its figures from the measuring half."""
    able = (j for j in at.share if at.info[j]["sign_consistency"] >= SIGN and _detects(at, [j]) >= F1)
    if (best := next(able, None)) is not None:
        local = localises(at.measuring, best) if plant.kind in LEXICAL else None
        row = _measured(rm, at, [best]) | {"localises": local}
        enough = row["f1"] >= F1 and row["mediated"]["low"] >= MEDIATED and (local is None or local >= MASS)
        if enough and (matched := _matched(rm, at, [best])) < row["mediated"]["value"] - TIE:
            return row | {"found": True, "hit": "single", "matched": matched}
    return {"found": False, "hit": "none", "mediated": None}


def _group(rm: RewardModel, at: _AtSite) -> dict[str, Any]:
    """The group grown on the fitting half, with its figures from the measuring half; where it is no hit, why."""
    if not at.info:
        why = "no reported feature has the planted sign"
        return {"found": False, "hit": "none", "why": why, "f1": None, "site": at.site, "mediated": None}
    group, fitted = _grow(rm, at)
    group = group or list(at.info)[:1]
    row = _measured(rm, at, group) | {"fitted": fitted}
    share = row["mediated"]["value"]
    if row["f1"] < F1:
        return row | {"why": "no reported feature detects it"}
    if share < GROUP_MEDIATED:
        return row | {"why": f"the features that detect it carry {round(share, 2) + 0.0:.0%} of its effect"}
    if (matched := _matched(rm, at, group)) >= share - TIE:
        return row | {"why": "matched features carry as much of its effect", "matched": matched}
    return row | {"found": True, "hit": "group", "matched": matched}


def _measured(rm: RewardModel, at: _AtSite, group: list[int]) -> dict[str, Any]:
    """A group on the measuring half: F1 at the fitting half's threshold, and its mediated share."""
    _, theta = threshold(*peaks(at.fitting, group, at.scale))
    f1 = f1_score(*peaks(at.measuring, group, at.scale), theta)
    rows = mediation(rm, at.sae, at.site, at.measuring, [group])[0]
    by_rank = sorted((at.info[j] for j in group), key=lambda row: row["rank"])
    return {
        "found": False, "hit": "none", "site": at.site, "features": group, "rank": by_rank[-1]["rank"],
        "effect": by_rank[0]["mean_effect"], "f1": f1, "mediated": mediated_share(rows, [t.prompt for t in at.measuring]),
    }  # fmt: skip


def _matched(rm: RewardModel, at: _AtSite, group: list[int]) -> float:
    """The largest share that any of :data:`CONTROLS` matched groups mediates on the measuring half."""
    groups = matched_groups(at.sae, at.measuring, group, CONTROLS)
    return max(0.0, *_shares(rm, at.sae, at.site, at.measuring, groups))


def _grow(rm: RewardModel, at: _AtSite) -> tuple[list[int], float]:
    """Greedily, by exact joint ablation on the fitting half, with the share that it mediates there; a member may not spoil
    what the union detects."""
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
    """Whether any group that :func:`_grow` may come to detects the cue on the measuring half, as a hit must."""
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
