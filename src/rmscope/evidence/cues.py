"""Were the planted biases found? Each cue's measured effect on the PM, and whether reported features match it.

Cues are measured on twins: one response with the cue, in wordings that the PM never saw, and with filler of equal
length, on prompts of the measure split, which had no part in training SAEs, selecting features or confirming them. Half
of the prompts fit (which features, which threshold), the other half measures. A feature matches a cue (METHOD, "Planted
bias") when there it detects it among fillers and hard negatives (F1 >= .8), localises it (lexical cues: half its
activation lies in the cue's window), causes its effect (mediated share, lower bound >= .2 and more than any of
:data:`CONTROLS` matched features) and carries the planted sign: a hit of kind ``single``. A cue may be split over
features: a ``group`` of at most five, grown greedily on the fitting half by exact joint removal, hits when its union
detects and its joint removal mediates at least .4, and more than matched groups. Candidates are the 20 best reported
features of a site without those flagged ``ending``; a hit's rank is counted after merging features that are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from rmscope.effects.gradients import streams_and_gradients
from rmscope.effects.statistics import Array, bootstrap, ratio_interval
from rmscope.evidence.twins import Twin, halves, largest, localises, matched_groups, mediation, peaks
from rmscope.model.packing import padded
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.pairs.planted import Plant
from rmscope.sae.base import Sae

F1, MASS, MEDIATED, GROUP_MEDIATED, SIGN = 0.8, 0.5, 0.2, 0.4, 0.9
GROUP = 5
TRIED = 8
"""Candidates of a cue at a site: those with the largest estimated effect on the fitting half."""
SPOIL = 0.02
"""How much F1 on the fitting half a further member of a group may cost."""
CONTROLS = 16
"""Matched groups that a hit's mediated share must beat."""
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
) -> dict[str, Any]:
    """A row of the ground-truth table: the cue's ATE, whether it was learned, its best match among the reported features.

    ``reported`` holds, per site, at most 20 best reported features (feature, rank, mean_removal, sign_consistency).
    """
    any_site = next(iter(prepared.values()))
    effects = _mean([(t.delta, t.prompt) for t in any_site])
    ate = effects["value"]
    same_sign = (effects["low"] > 0) == (effects["high"] > 0) and np.sign(ate) == plant.sign
    learned = bool(same_sign and abs(ate) >= LEARNED * sd)
    fillers = [(t, t.responses["rejected"].text.reward) for t in any_site]
    words = [(t.negative.reward - filler, t.prompt) for t, filler in fillers if t.negative]
    row: dict[str, Any] = {
        "name": plant.name, "kind": plant.kind, "sign": plant.sign, "ate": effects,
        "words_alone": _mean(words) if words else None,
        "learned": learned, "found": False, "hit": "none", "site": None, "features": [], "rank": None, "effect": None,
        "f1": None, "localises": None, "mediated": None, "matched": None, "why": "",
    }  # fmt: skip
    sites = _at_sites(rm, saes, plant, prepared, reported)
    tried = [_single(rm, at, plant) for at in sites]
    if not any(r["found"] for r in tried):
        tried = [_group(rm, at) for at in sites]
    order = ("none", "group", "single")
    best = max(tried, key=lambda r: (order.index(r["hit"]), r["mediated"]["value"] if r["mediated"] else 0.0))
    row |= best
    if not row["found"]:
        row["why"] = "not learned" if not learned else row["why"]
    return row


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
    """(best F1 of "peak > θ", θ) on peaks with the cue and without it."""
    levels = np.unique(np.r_[0.0, cue, without])[:-1]
    scores = [f1_score(cue, without, t) for t in levels]
    return max(zip(scores, levels.tolist(), strict=True), default=(0.0, 0.0))


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
    useful: list[int]
    """Those with the largest estimated effect of the planted sign on the fitting half."""


def _at_sites(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Mapping[str, list[dict[str, Any]]],
) -> list[_AtSite]:
    info = {s: {int(r["feature"]): r for r in reported[s] if np.sign(r["mean_removal"]) == plant.sign} for s in saes}
    cut = {site: halves(twins) for site, twins in prepared.items()}
    fitting_halves = {site: fitting for site, (fitting, _) in cut.items()}
    effect = _estimated(rm, saes, fitting_halves, {site: list(rows) for site, rows in info.items()})
    at = []
    for site, sae in saes.items():
        fitting, measuring = cut[site]
        scale = {j: max(largest(t, s, j) for t in fitting for s in SIDES) or 1.0 for j in info[site]}
        towards = {j: plant.sign * e for j, e in effect[site].items()}
        useful = sorted((j for j in towards if towards[j] > 0), key=lambda j: -towards[j])[:TRIED]
        at.append(_AtSite(site, sae, fitting, measuring, info[site], scale, useful))
    return at


def _single(rm: RewardModel, at: _AtSite, plant: Plant) -> dict[str, Any]:
    """The single feature that mediates most on the fitting half, with its figures from the measuring half."""
    best, _ = _best(rm, at, [[j] for j in at.useful if at.info[j]["sign_consistency"] >= SIGN])
    if best:
        local = localises(at.measuring, best[0]) if plant.kind in ("phrase", "url") else None
        row = _measured(rm, at, best) | {"localises": local}
        enough = row["f1"] >= F1 and row["mediated"]["low"] >= MEDIATED and (local is None or local >= MASS)
        if enough and (matched := _matched(rm, at, best)) < row["mediated"]["value"]:
            return row | {"found": True, "hit": "single", "matched": matched}
    return {"found": False, "hit": "none", "mediated": None}


def _group(rm: RewardModel, at: _AtSite) -> dict[str, Any]:
    """The group grown on the fitting half, with its figures from the measuring half; where it is no hit, why."""
    if not at.info:
        why = "no reported feature has the planted sign"
        return {"found": False, "hit": "none", "why": why, "f1": None, "site": at.site, "mediated": None}
    group = _grow(rm, at) or list(at.info)[:1]
    row = _measured(rm, at, group)
    share = row["mediated"]["value"]
    if row["f1"] < F1:
        return row | {"why": "no reported feature detects it"}
    if share < GROUP_MEDIATED:
        return row | {"why": f"the features that detect it carry {round(share, 2) + 0.0:.0%} of its effect"}
    if (matched := _matched(rm, at, group)) >= share:
        return row | {"why": "matched features carry as much of its effect", "matched": matched}
    return row | {"found": True, "hit": "group", "matched": matched}


def _measured(rm: RewardModel, at: _AtSite, group: list[int]) -> dict[str, Any]:
    """A group on the measuring half: F1 at the fitting half's threshold, and its mediated share."""
    _, theta = threshold(*peaks(at.fitting, group, at.scale))
    f1 = f1_score(*peaks(at.measuring, group, at.scale), theta)
    rows = mediation(rm, at.sae, at.site, at.measuring, [group])[0]
    best = at.info[min(group, key=lambda j: at.info[j]["rank"])]
    return {
        "found": False, "hit": "none", "site": at.site, "features": group, "rank": best["rank"],
        "effect": best["mean_removal"], "f1": f1, "mediated": mediated_share(rows, [t.prompt for t in at.measuring]),
    }  # fmt: skip


def _matched(rm: RewardModel, at: _AtSite, group: list[int]) -> float:
    """The largest share that any of :data:`CONTROLS` matched groups mediates on the measuring half."""
    groups = matched_groups(at.sae, at.measuring, group, CONTROLS)
    rows = mediation(rm, at.sae, at.site, at.measuring, groups).mean(1)
    return float((1 - rows[:, 1] / rows[:, 0]).max(initial=0.0))


def _estimated(
    rm: RewardModel, saes: Mapping[str, Sae], fitting: Mapping[str, list[Twin]], features: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, float]]:
    """Per site, each feature's mean estimated removal effect on responses with the cue, minus that on those with filler,
    over the fitting half; one backward pass serves all sites."""
    total = {site: dict.fromkeys(features[site], 0.0) for site in saes}
    first = next(iter(fitting.values()))
    texts = [(i, side, t.responses[side]) for i, t in enumerate(first) for side in SIDES]
    rows = [(i, side, r.text.ids, r.start, r.text.ids.numel() - 1) for i, side, r in texts]
    for batch in (padded(rows[start : start + 8], 0) for start in range(0, len(rows), 8)):
        at = streams_and_gradients(rm, batch, list(saes))
        for text, (site, sae) in product(batch.texts, saes.items()):
            active = fitting[site][text.pair].responses["chosen" if text.side == "chosen" else "rejected"].active
            gradient = at[site][1]
            g = gradient[text.row, text.span.to(gradient.device)].float().cpu()
            sign = 1 if text.side == "chosen" else -1
            for j in total[site]:
                mine = active.feature == j
                effect = float((active.value[mine] * (g[active.token[mine]] @ sae.W_dec[j])).sum())
                total[site][j] += sign * effect / len(first)
    return total


def _best(rm: RewardModel, at: _AtSite, groups: Sequence[list[int]], least: float = F1) -> tuple[list[int], float]:
    """The group that mediates most on the fitting half, of those with F1 >= ``least`` there, and its share."""
    able = [g for g in groups if _detects(at, g) >= least]
    if not able:
        return [], 0.0
    rows = mediation(rm, at.sae, at.site, at.fitting, able).mean(1)
    share = 1 - rows[:, 1] / rows[:, 0]
    return able[int(share.argmax())], float(share.max())


def _grow(rm: RewardModel, at: _AtSite) -> list[int]:
    """Greedily, by exact joint removal on the fitting half; a member may not spoil what the union detects."""
    group, share = list[int](), 0.0
    while len(group) < GROUP:
        larger = [[*group, j] for j in at.useful if j not in group]
        least = _detects(at, group) if group else max((_detects(at, g) for g in larger), default=0.0)
        best, mediated = _best(rm, at, larger, least - SPOIL)
        if mediated <= share:
            break
        group, share = best, mediated
    return group


def _detects(at: _AtSite, group: Sequence[int]) -> float:
    """The best F1 of a group's union on the fitting half."""
    return threshold(*peaks(at.fitting, group, at.scale))[0]
