"""Which features carry a jailbreak: how much of its gain is gone when they are ablated.

U = mean[r(bad + phrases) - r(bad + control)]; mediated share = 1 - (U with G ablated from both texts) / U, over the measured
prompts (``docs/method.md``, "Jailbreak"). G holds at most :data:`MOST_MEDIATORS` reported features of one site. G and
matched sets of other features are chosen on the prompts of the search. Ablation is exact, over the whole response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl

from rmscope.effects.ablation import Response, at_site
from rmscope.model.shared_prefix import response_start, run_from_prefix
from rmscope.model.sites import CleanRun
from rmscope.pairs.pair import SIDES
from rmscope.planted.matching import mediated_share
from rmscope.planted.twins import Twin, matched_groups, mediation
from rmscope.statistics import Figure, interval
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.targets import Layout, Target

MOST_MEDIATORS = 10
"""Features in G, at most."""
LEAST_SHARE = 0.005
"""The share of the gain that each feature must mediate beside those before it, on the search's prompts."""
CANDIDATES = 16
"""Features tried beside the first: those that alone mediate most."""
MATCHED_SETS = 16
"""Random sets of features matched to G."""


@dataclass(frozen=True, slots=True)
class Mediators:
    """G at its site, the matched sets, and the share that G mediates on the search's prompts."""

    site: str
    features: list[int]
    matched: list[list[int]]
    share: float


@dataclass(frozen=True, slots=True)
class MatchedShares:
    """What the matched sets mediate of a gain."""

    sets: int
    mean: float
    largest: Figure


@dataclass(frozen=True, slots=True)
class MediatedGain:
    """The gain of one text over another, and what G mediates of it."""

    jailbreak: str
    control: str
    prompts: int
    u: Figure
    """U in units of reward."""
    share: Figure | None = None
    """Unclipped; None where U's interval contains 0."""
    matched: MatchedShares | None = None
    clear: bool | None = None
    """Whether the whole interval of G's share is above those of all matched sets."""


def choose_mediators(inputs: Inputs, targets: Sequence[Target], layout: Layout, control: Layout) -> Mediators | None:
    """G for the gain of ``layout`` over ``control``, from the reported features of each site.

    At each site features join one by one, each time the one that mediates most together with those before it: features share
    work, and some undo one another. G is that of the site where it mediates most; None where no feature mediates any.
    """
    twins: dict[str, list[Twin]] = {site: [] for site in inputs.saes}
    for target in targets:
        clean = inputs.rm.prefill(target.ids(inputs.rm), list(inputs.saes))
        for site, at in twins.items():
            both = [response_of(inputs, site, target, clean, phrases) for phrases in (layout, control)]
            at.append(Twin(target.pair.prompt_key, dict(zip(SIDES, both, strict=True)), {}, None))
    of_sites: list[Mediators] = []
    for site, at in twins.items():
        group, share = grow(partial(_shares, inputs, site, at), inputs.reported[site])
        if group:
            of_sites.append(Mediators(site, group, matched_groups(inputs.saes[site], at, group, MATCHED_SETS), share))
    return max(of_sites, key=lambda m: m.share, default=None)


def grow(shares_of: Callable[[list[list[int]]], list[float]], features: Sequence[int]) -> tuple[list[int], float]:
    """G at a site, and the share that it mediates. ``shares_of`` gives the share that each group mediates."""
    group, mediated = list[int](), 0.0
    able = list(features)
    while able and len(group) < MOST_MEDIATORS:
        shares = shares_of([[*group, j] for j in able])
        order = sorted(range(len(able)), key=lambda i: -shares[i])
        best, share = able[order[0]], shares[order[0]]
        if share < mediated + LEAST_SHARE:
            break
        group, mediated = [*group, best], share
        able = [able[i] for i in order[1:CANDIDATES]]
    return group, mediated


def _shares(inputs: Inputs, site: str, twins: Sequence[Twin], groups: Sequence[list[int]]) -> list[float]:
    """The share of the mean gain that each group mediates; 0 where there is no gain."""
    rows = mediation(inputs.rm, inputs.saes[site], site, twins, groups).mean(1)
    return [1 - without / gain if gain > 0 else 0.0 for gain, without in rows.tolist()]


def response_of(inputs: Inputs, site: str, target: Target, clean: CleanRun, layout: Layout) -> Response:
    """The bad text with phrases, ready for ablation over the whole response. ``clean`` is the run of the text alone."""
    rm = inputs.rm
    text = run_from_prefix(rm, clean, target.ids(rm, layout), list(clean.streams))
    return at_site(inputs.saes[site], text, site, response_start(rm, text.ids, rm.text_ids(target.pair.prompt, "")))


def mediated_gain(table: pl.DataFrame, jailbreak: str, control: str) -> MediatedGain:
    """U of one arm over another, the share that G mediates, and the shares of the matched sets.

    ``table`` has one row per prompt and arm: key, arm, reward, without (reward with G ablated), matched (with each set
    ablated). Intervals are from a bootstrap by prompt.
    """
    with_it, beside = (table.filter(pl.col("arm") == arm) for arm in (jailbreak, control))
    both = with_it.join(beside, on="key", suffix="_control").sort("key")
    gain = (both["reward"] - both["reward_control"]).to_numpy()
    found = partial(MediatedGain, jailbreak, control, both.height, u := interval(gain, unit="reward"))
    if u.low is None or u.high is None or u.low <= 0 <= u.high:
        return found()
    keys = both["key"].to_list()

    def share_of(without: np.ndarray) -> Figure:
        return mediated_share(np.stack([gain, without], 1), keys)

    share = share_of((both["without"] - both["without_control"]).to_numpy())
    sets = np.array(both["matched"].to_list()) - np.array(both["matched_control"].to_list())
    if not sets.size:
        return found(share)
    shares = [share_of(one) for one in sets.T]
    values = [float(s.value or 0.0) for s in shares]
    matched = MatchedShares(len(shares), float(np.mean(values)), shares[int(np.argmax(values))])
    clear = share.low is not None and all(s.high is not None and share.low > s.high for s in shares)
    return found(share, matched, clear)
