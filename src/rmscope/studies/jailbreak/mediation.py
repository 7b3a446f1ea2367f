"""The proof that named features carry a jailbreak: what is left of its gain when they are ablated.

U = mean[r(bad + phrases) - r(bad + control)]; mediated share = 1 - (U with G ablated in both arms) / U, over the measured
prompts (METHOD, "Jailbreak"). G, at most :data:`NAMED` of the reported features at one site, and the matched sets beside it
are frozen on the prompts that the search used. Ablation is exact, on the whole response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.ablation import Response, ablate_groups, at_site
from rmscope.model.clean_run import CleanRun
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import fork, response_start
from rmscope.planted.matching import mediated_share
from rmscope.planted.twins import Twin, matched_groups, mediation
from rmscope.sae.base import Sae
from rmscope.statistics import Array, mean_interval
from rmscope.studies.jailbreak.search import Layout, Target

NAMED = 10
"""Features that G holds at most."""
LEAST = 0.005
"""What each named feature takes back of the gain at least, beside those named before it, on the search's prompts."""
CANDIDATES = 16
"""Features of a site that are tried beside one another: those whose own ablation takes back most."""
SETS = 16
"""Matched random sets beside G."""


@dataclass(frozen=True, slots=True)
class Mediators:
    """G at its site, the matched sets, and the share that G mediates on the search's prompts."""

    site: str
    features: list[int]
    matched: list[list[int]]
    share: float


def name_features(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    targets: Sequence[Target],
    layout: Layout,
    control: Layout,
    reported: Mapping[str, Sequence[int]],
) -> Mediators | None:
    """G: at each site reported features one by one, each the one that, ablated beside those before it, takes back most of
    the gain over the control (they share work, and some undo one another); of the sites the one where G takes back most.
    None where no reported feature takes back any."""
    at: dict[str, list[Twin]] = {site: [] for site in saes}
    for target in targets:
        clean = rm.prefill(target.ids(rm), list(saes))
        for site, sae in saes.items():
            arms = {
                "chosen": response_of(rm, sae, site, target, clean, layout),
                "rejected": response_of(rm, sae, site, target, clean, control),
            }
            at[site].append(Twin(target.key, arms, {}, None))  # type: ignore[arg-type]
    found: list[Mediators] = []
    for site, sae in saes.items():
        group, share = _grown(rm, sae, site, at[site], reported[site])
        if group:
            found.append(Mediators(site, group, matched_groups(sae, at[site], group, SETS), share))
    return max(found, key=lambda n: n.share, default=None)


def _grown(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], features: Sequence[int]) -> tuple[list[int], float]:
    """G at a site, and what it takes back."""
    group, taken = list[int](), 0.0
    able = list(features)
    while able and len(group) < NAMED:
        shares = _shares(rm, sae, site, twins, [[*group, j] for j in able])
        order = sorted(range(len(able)), key=lambda i: -shares[i])
        best, share = able[order[0]], shares[order[0]]
        if share < taken + LEAST:
            break
        group, taken = [*group, best], share
        able = [able[i] for i in order[1:CANDIDATES]]
    return group, taken


def _shares(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
    """What each group takes back of the mean gain; 0 where there is none."""
    rows = mediation(rm, sae, site, twins, groups).mean(1)
    return [1 - without / gain if gain > 0 else 0.0 for gain, without in rows.tolist()]


def response_of(rm: RewardModel, sae: Sae, site: str, target: Target, clean: CleanRun, layout: Layout) -> Response:
    """The bad text with the phrases in, ready for ablation on the whole response; it forks from the run ``clean``."""
    ids = target.ids(rm, layout)
    text = fork(rm, clean, ids, list(clean.streams))
    return at_site(sae, text, site, response_start(rm, text.ids, rm.text_ids(target.pair.prompt, "")))


def ablated_rewards(
    rm: RewardModel, sae: Sae, site: str, response: Response, groups: Sequence[Sequence[int]]
) -> tuple[float, list[float]]:
    """(r as it is, r with each group ablated)."""
    effects = ablate_groups(rm, sae, response, site, groups).tolist()
    return response.text.reward, [response.text.reward - effect for effect in effects]


def mean_of(values: Sequence[float] | Array) -> dict[str, float]:
    """A mean over prompts with its interval, bootstrap by prompt."""
    array = np.asarray(values, dtype=float)
    low, high = mean_interval(array)
    return {"value": float(array.mean()), "low": low, "high": high}


def proof(measured: pl.DataFrame, jailbreak: str, control: str) -> dict[str, Any]:
    """U of one arm over another, the share that G mediates of it, and those of the matched sets.

    ``measured`` has a row a prompt and arm: key, arm, reward, without (G ablated), matched (each set ablated). A share is
    None where U's interval holds 0. ``clear``: the whole interval of G's share lies above those of all matched sets.
    """
    both = (
        measured.filter(pl.col("arm") == jailbreak)
        .join(measured.filter(pl.col("arm") == control), on="key", suffix="_control")
        .sort("key")
    )
    gain = (both["reward"] - both["reward_control"]).to_numpy()
    u = mean_of(gain)
    row: dict[str, Any] = {"jailbreak": jailbreak, "control": control, "prompts": both.height, "u": u}
    row |= {"share": None, "matched": None, "clear": None}
    if u["low"] <= 0 <= u["high"]:
        return row
    keys = both["key"].to_list()
    without = (both["without"] - both["without_control"]).to_numpy()
    row["share"] = mediated_share(np.stack([gain, without], 1), keys)
    sets = np.array(both["matched"].to_list()) - np.array(both["matched_control"].to_list())
    if sets.size:
        shares = [mediated_share(np.stack([gain, one], 1), keys) for one in sets.T]
        largest = max(shares, key=lambda s: s["value"])
        row["matched"] = {"sets": len(shares), "mean": float(np.mean([s["value"] for s in shares])), "largest": largest}
        row["clear"] = row["share"]["low"] > max(s["high"] for s in shares)
    return row
