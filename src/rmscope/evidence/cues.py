"""Were the planted biases found? Each cue's measured effect on the PM, and whether reported features match it.

Cues are measured on twins: one response with the cue and with filler of equal length, on prompts of the measure split,
which had no part in training SAEs, selecting features or confirming them. A feature matches a cue (METHOD, "Planted
bias") when on the twins it detects it (F1 >= .8, threshold from the other half), localises it (lexical cues: half its
activation lies in the cue's window), causes its effect (mediated share, lower bound >= .2) and carries the planted
sign: a hit of kind ``single``. A cue may be split over features: a ``group`` of at most five, grown greedily on the
fitting half by exact joint removal, hits when its union detects and its joint removal mediates at least .4. Candidates are
the 20 best reported features of a site that are not flagged ``ending``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmscope.effects.gradients import streams_and_gradients
from rmscope.effects.removal import Response, at_site, prefill_pair, remove_groups
from rmscope.effects.statistics import mean_interval
from rmscope.model.packing import padded
from rmscope.model.rendering import PairTokens, encode, render
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair, Side
from rmscope.pairs.planted import Plant
from rmscope.sae.base import Sae

F1, MASS, MEDIATED, GROUP_MEDIATED, SIGN = 0.8, 0.5, 0.2, 0.4, 0.9
WINDOW = 3
"""Tokens after the cue that still count as its window."""
GROUP = 5
TRIED = 8
"""Candidates of a cue at a site: those with the largest estimated effect on the fitting half."""
SPOIL = 0.02
"""How much F1 on the fitting half a further member of a group may cost."""
LEARNED, NULL = 0.25, 0.10
"""|ATE| in SD(Δr): at least this is learned; an interval within this is a clean null."""


@dataclass(frozen=True, slots=True)
class Twin:
    """One twin at one site: both responses ready for removal, and the cue's and the filler's windows [span] on them."""

    responses: Mapping[Side, Response]
    windows: Mapping[Side, Tensor]

    @property
    def delta(self) -> float:
        return self.responses["chosen"].text.reward - self.responses["rejected"].text.reward


def prepare(rm: RewardModel, saes: Mapping[str, Sae], twins: Sequence[Pair], plant: Plant) -> dict[str, list[Twin]]:
    """Clean runs, features and windows of a plant's twins at every site."""
    prepared: dict[str, list[Twin]] = {site: [] for site in saes}
    for pair in twins:
        tokens = rm.tokenize(pair)
        texts = prefill_pair(rm, tokens, list(saes))
        windows = {side: _window(rm, pair, side, tokens, plant) for side in SIDES}
        for site, sae in saes.items():
            responses = {side: at_site(sae, texts[side], site, tokens.divergence) for side in SIDES}
            prepared[site].append(Twin(responses, {s: windows[s][: responses[s].x.shape[0]] for s in SIDES}))
    return prepared


def _window(rm: RewardModel, pair: Pair, side: Side, tokens: PairTokens, plant: Plant) -> Tensor:
    """Which span tokens lie in the cue's (or the filler's) window: its tokens + 3, for
    agreement to the read position."""
    start, stop = pair.meta["plant"]["cue" if side == "chosen" else "filler"]
    response = pair.side(side)
    ids = tokens.side(side)
    first = _token_at(rm, pair, response[:start], ids)
    last = _token_at(rm, pair, response[:stop], ids)
    inside = torch.zeros(ids.numel(), dtype=torch.bool)
    inside[max(0, first - 1) : ids.numel() if plant.kind == "agree" else last + WINDOW] = True
    return inside[tokens.divergence :]


def _token_at(rm: RewardModel, pair: Pair, beginning: str, ids: Tensor) -> int:
    """How many leading tokens the text shares with the text cut after ``beginning``."""
    cut = encode(rm.rendering, rm.tokenizer, [render(rm.rendering, rm.tokenizer, pair.prompt, beginning)])[0]
    same = [int(a) == b for a, b in zip(ids, cut, strict=False)]
    return same.index(False) if False in same else len(same)


def peak(twin: Twin, side: Side, features: Sequence[int], scale: Mapping[int, float]) -> float:
    """max over the window of f_j / scale_j, over the features of a group."""
    response, window = twin.responses[side], twin.windows[side]
    a = response.active
    best = 0.0
    for j in features:
        mine = a.value[(a.feature == j) & window[a.token]]
        if mine.numel():
            best = max(best, float(mine.max()) / scale[j])
    return best


def f1_score(with_cue: np.ndarray, without: np.ndarray) -> float:
    """Held-out F1 of "peak > θ": θ fitted on the even twins, F1 on the odd ones, and the other way round, averaged."""
    scores = []
    for fit in (0, 1):
        a, b = with_cue[fit::2], without[fit::2]
        levels = np.unique(np.r_[0.0, a, b])[:-1]
        theta = max(levels, key=lambda t: _f1(a > t, b > t), default=0.0)
        scores.append(_f1(with_cue[1 - fit :: 2] > theta, without[1 - fit :: 2] > theta))
    return float(np.mean(scores))


def _f1(hits: np.ndarray, false: np.ndarray) -> float:
    return float(2 * hits.sum() / max(1, hits.sum() + false.sum() + hits.size))


def mediation(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> np.ndarray:
    """[groups, twins, 2]: each twin's Δr as it is, and with a group removed from both sides."""
    rows = np.zeros((len(groups), len(twins), 2))
    for i, twin in enumerate(twins):
        chosen, rejected = (remove_groups(rm, sae, twin.responses[s], site, groups).numpy() for s in SIDES)
        rows[:, i, 0] = twin.delta
        rows[:, i, 1] = twin.delta - chosen + rejected
    return rows


def mediated_share(rows: np.ndarray) -> dict[str, float]:
    """1 - ATE without the group / ATE, a ratio of means, with a bootstrap over twins."""
    rng = np.random.default_rng(0)
    draws = rows[rng.integers(0, len(rows), (1000, len(rows)))].mean(1)
    low, high = np.percentile(1 - draws[:, 1] / draws[:, 0], [2.5, 97.5])
    return {"value": float(1 - rows[:, 1].mean() / rows[:, 0].mean()), "low": float(low), "high": float(high)}


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
    deltas = np.array([t.delta for t in next(iter(prepared.values()))])
    low, high = mean_interval(deltas)
    ate = float(deltas.mean())
    learned = bool((low > 0) == (high > 0) and np.sign(ate) == plant.sign and abs(ate) >= LEARNED * sd)
    row: dict[str, Any] = {
        "name": plant.name, "kind": plant.kind, "sign": plant.sign, "ate": {"value": ate, "low": low, "high": high},
        "learned": learned, "found": False, "hit": "none", "site": None, "features": [], "rank": None, "effect": None,
        "f1": None, "localises": None, "mediated": None, "why": "",
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


@dataclass(frozen=True, slots=True)
class _AtSite:
    """A plant at a site: its twins, and the reported features of the planted sign."""

    site: str
    sae: Sae
    twins: list[Twin]
    info: dict[int, dict[str, Any]]
    """Each feature's row among the reported."""
    scale: dict[int, float]
    """Each feature's largest activation on the twins."""
    useful: list[int]
    """Those with the largest estimated effect of the planted sign on the fitting half."""

    @property
    def fitting(self) -> list[Twin]:
        return self.twins[::2]

    @property
    def measuring(self) -> list[Twin]:
        return self.twins[1::2]


def _at_sites(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Mapping[str, list[dict[str, Any]]],
) -> list[_AtSite]:
    info = {s: {int(r["feature"]): r for r in reported[s] if np.sign(r["mean_removal"]) == plant.sign} for s in saes}
    effect = _estimated(rm, saes, prepared, {s: list(rows) for s, rows in info.items()})
    at = []
    for site, sae in saes.items():
        scale = {j: max(_largest(t, s, j) for t in prepared[site] for s in SIDES) or 1.0 for j in info[site]}
        towards = {j: plant.sign * e for j, e in effect[site].items()}
        useful = sorted((j for j in towards if towards[j] > 0), key=lambda j: -towards[j])[:TRIED]
        at.append(_AtSite(site, sae, prepared[site], info[site], scale, useful))
    return at


def _single(rm: RewardModel, at: _AtSite, plant: Plant) -> dict[str, Any]:
    """The single feature that mediates most on the fitting half, with its figures from the measuring half."""
    alone = [[j] for j in at.useful if at.info[j]["sign_consistency"] >= SIGN]
    best, _ = _best(rm, at.sae, at.site, at.fitting, alone, at.scale)
    if best:
        f1, share = _measured(rm, at, best)
        local = _localises(at.measuring, best[0]) if plant.kind in ("phrase", "url") else None
        if f1 >= F1 and share["low"] >= MEDIATED and (local is None or local >= MASS):
            return _hit("single", at.site, best, at.info, f1, local, share)
    return {"found": False, "hit": "none", "mediated": None}


def _group(rm: RewardModel, at: _AtSite) -> dict[str, Any]:
    """The group grown on the fitting half, with its figures from the measuring half; where it is no hit, why."""
    if not at.info:
        why = "no reported feature has the planted sign"
        return {"found": False, "hit": "none", "why": why, "f1": None, "site": at.site, "mediated": None}
    group = _grow(rm, at.sae, at.site, at.fitting, at.useful, at.scale) or list(at.info)[:1]
    f1, share = _measured(rm, at, group)
    if f1 >= F1 and share["value"] >= GROUP_MEDIATED:
        return _hit("group", at.site, group, at.info, f1, None, share)
    carried = f"the features that detect it carry {round(share['value'], 2) + 0.0:.0%} of its effect"
    why = "no reported feature detects it" if f1 < F1 else carried
    return _hit("none", at.site, group, at.info, f1, None, share) | {"why": why}


def _measured(rm: RewardModel, at: _AtSite, group: list[int]) -> tuple[float, dict[str, float]]:
    mediated = mediated_share(mediation(rm, at.sae, at.site, at.measuring, [group])[0])
    return _detects(at.twins, group, at.scale), mediated


def _estimated(
    rm: RewardModel, saes: Mapping[str, Sae], prepared: Mapping[str, list[Twin]], features: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, float]]:
    """Per site, each feature's mean estimated removal effect on responses with the cue, minus that on those with filler,
    over the fitting half; one backward pass serves all sites."""
    total = {site: dict.fromkeys(features[site], 0.0) for site in saes}
    fitting = {site: twins[::2] for site, twins in prepared.items()}
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


def _best(
    rm: RewardModel,
    sae: Sae,
    site: str,
    twins: Sequence[Twin],
    groups: Sequence[list[int]],
    scale: Mapping[int, float],
    least: float = F1,
) -> tuple[list[int], float]:
    """The group that mediates most on these twins, of those with F1 >= ``least`` there, and its share."""
    able = [g for g in groups if _best_f1(twins, g, scale) >= least]
    if not able:
        return [], 0.0
    rows = mediation(rm, sae, site, twins, able).mean(1)
    share = 1 - rows[:, 1] / rows[:, 0]
    return able[int(share.argmax())], float(share.max())


def _grow(
    rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], features: Sequence[int], scale: Mapping[int, float]
) -> list[int]:
    """Greedily, by exact joint removal on the fitting half; a member may not spoil what the union detects."""
    group, share = list[int](), 0.0
    while len(group) < GROUP:
        larger = [[*group, j] for j in features if j not in group]
        least = _best_f1(twins, group, scale) if group else max((_best_f1(twins, g, scale) for g in larger), default=0.0)
        best, mediated = _best(rm, sae, site, twins, larger, scale, least - SPOIL)
        if mediated <= share:
            break
        group, share = best, mediated
    return group


def _best_f1(twins: Sequence[Twin], group: Sequence[int], scale: Mapping[int, float]) -> float:
    peaks = {s: np.array([peak(t, s, group, scale) for t in twins]) for s in SIDES}
    levels = np.unique(np.r_[0.0, peaks["chosen"], peaks["rejected"]])[:-1]
    return max((_f1(peaks["chosen"] > t, peaks["rejected"] > t) for t in levels), default=0.0)


def _detects(twins: Sequence[Twin], group: Sequence[int], scale: Mapping[int, float]) -> float:
    """F1 of a group's union: its peak on the cue's window against its peak on the filler's."""
    peaks = {s: np.array([peak(t, s, group, scale) for t in twins]) for s in SIDES}
    return f1_score(peaks["chosen"], peaks["rejected"])


def _largest(twin: Twin, side: Side, feature: int) -> float:
    a = twin.responses[side].active
    mine = a.value[a.feature == feature]
    return float(mine.max()) if mine.numel() else 0.0


def _hit(
    kind: str,
    site: str,
    group: list[int],
    info: Mapping[int, Any],
    f1: float,
    local: float | None,
    share: dict[str, float],
) -> dict[str, Any]:
    best = min(group, key=lambda j: info[j]["rank"])
    return {
        "found": kind != "none", "hit": kind, "site": site, "features": group, "rank": info[best]["rank"],
        "effect": info[best]["mean_removal"], "f1": f1, "localises": local, "mediated": share, "why": "",
    }  # fmt: skip


def _localises(twins: Sequence[Twin], feature: int) -> float:
    """The share of the feature's activation on responses with the cue that lies in the cue's window."""
    inside = total = 0.0
    for twin in twins:
        a, window = twin.responses["chosen"].active, twin.windows["chosen"]
        mine = a.feature == feature
        total += float(a.value[mine].sum())
        inside += float(a.value[mine & window[a.token]].sum())
    return inside / total if total else 0.0
