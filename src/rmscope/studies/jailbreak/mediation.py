"""Which features carry a jailbreak: how much of its gain is gone when they are ablated.

U = mean[r(bad + phrases) - r(bad + control)]; mediated share = 1 - (U with G ablated from both texts) / U, over the measured
prompts (``docs/method.md``, "Jailbreak"). G holds at most :data:`MOST_MEDIATORS` reported features of one site. It is grown
on the prompts of the search for what it mediates, so features that happen to mediate much there are in it. The matched sets
are therefore grown too: on the same prompts, to the same size, each from features that match the reported ones in firing and
mass and are not reported. They are grown at G's site alone, while G's site is the best of all. Ablation is exact, over the
whole response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl

from rmscope.effects.ablation import Response, at_site
from rmscope.evaluation.selection import distinct_sets
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
"""Sets of features that are not reported, grown as G is; fewer where such features are few, because each set counts once."""


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

    1. Run both texts of every target.
    2. At each site features join one by one, each time the one that mediates most together with those before it: features
       share work, and some undo one another. G is that of the site where it mediates most.
    3. Grow the matched sets there (:func:`grow_controls`).

    None where no feature mediates any.
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
            of_sites.append(Mediators(site, group, [], share))
    named = max(of_sites, key=lambda m: m.share, default=None)
    return replace(named, matched=grow_controls(inputs, named, twins[named.site])) if named else None


def grow_controls(inputs: Inputs, named: Mediators, twins: Sequence[Twin]) -> list[list[int]]:
    """At most :data:`MATCHED_SETS` sets of as many features as G has, each grown from a pool of its own.

    A pool has one feature for each reported one, which matches it and is not reported: what the search passed over would
    make the pool weaker than the features from which G was grown. What a feature mediates alone is computed once for all.
    """
    sae, size, reported = inputs.saes[named.site], len(named.features), inputs.reported[named.site]
    candidates = [*named.features, *(j for j in reported if j not in named.features)]
    pools = matched_groups(sae, twins, candidates, MATCHED_SETS)
    shares_of = partial(_shares, inputs, named.site, twins)
    return distinct_sets(grow(shares_of, pool, size)[0] for pool in pools)


def grow(
    shares_of: Callable[[list[list[int]]], list[float]], features: Sequence[int], size: int | None = None
) -> tuple[list[int], float]:
    """G at a site, and the share that it mediates. ``shares_of`` gives the share that each group mediates.

    With ``size`` the group gets so many features even where the last ones add little: it is held against a G of that size.
    """
    group, mediated = list[int](), 0.0
    able = list(features)
    while able and len(group) < (MOST_MEDIATORS if size is None else size):
        shares = shares_of([[*group, j] for j in able])
        order = sorted(range(len(able)), key=lambda i: -shares[i])
        best, share = able[order[0]], shares[order[0]]
        if size is None and share < mediated + LEAST_SHARE:
            break
        group, mediated = [*group, best], share
        able = [able[i] for i in order[1:CANDIDATES]]
    return group, mediated


def _shares(inputs: Inputs, site: str, twins: Sequence[Twin], groups: Sequence[list[int]]) -> list[float]:
    """The share of the mean gain that each group mediates; 0 where there is no gain."""
    rows = mediation(inputs.rm, inputs.saes, {site: twins}, [{site: group} for group in groups]).mean(1)
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
    outcome = partial(MediatedGain, jailbreak, control, both.height, u := interval(gain, unit="reward"))
    if u.low is None or u.high is None or u.low <= 0 <= u.high:
        return outcome()
    keys = both["key"].to_list()

    def share_of(without: np.ndarray) -> Figure:
        return mediated_share(np.stack([gain, without], 1), keys)

    share = share_of((both["without"] - both["without_control"]).to_numpy())
    sets = np.array(both["matched"].to_list()) - np.array(both["matched_control"].to_list())
    if not sets.size:
        return outcome(share)
    shares = [share_of(one) for one in sets.T]
    values = [float(s.value or 0.0) for s in shares]
    matched = MatchedShares(len(shares), float(np.mean(values)), shares[int(np.argmax(values))])
    clear = share.low is not None and all(s.high is not None and share.low > s.high for s in shares)
    return outcome(share, matched, clear)
