"""Which features carry a jailbreak: how much of its gain is gone when they are ablated.

U = mean[r(bad + phrases) - r(bad + control)]; mediated share = 1 - (U with G ablated from both texts) / U, over the measured
prompts (``docs/method.md``, "Jailbreak"). G holds at most :data:`MOST_MEDIATORS` reported features of one site. G and
matched sets of other features are chosen on the prompts of the search. Ablation is exact, over the whole response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rmscope.effects.ablation import Response, ablate_groups, at_site
from rmscope.model.clean_run import CleanRun
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start, run_from_prefix
from rmscope.planted.matching import mediated_share
from rmscope.planted.twins import Twin, matched_groups, mediation
from rmscope.sae.base import Sae
from rmscope.statistics import Figure, interval
from rmscope.studies.jailbreak.placement import Layout
from rmscope.studies.jailbreak.targets import Target

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
    share: Figure | None
    """Unclipped; None where U's interval contains 0."""
    matched: MatchedShares | None
    clear: bool | None
    """Whether the whole interval of G's share is above those of all matched sets."""


def choose_mediators(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    targets: Sequence[Target],
    layout: Layout,
    control: Layout,
    reported: Mapping[str, Sequence[int]],
) -> Mediators | None:
    """G for the gain of ``layout`` over ``control``, from the ``reported`` features of each site.

    At each site features join one by one, each time the one that mediates most together with those before it: features share
    work, and some undo one another. G is that of the site where it mediates most; None where no feature mediates any.
    """
    at: dict[str, list[Twin]] = {site: [] for site in saes}
    for target in targets:
        clean = rm.prefill(target.ids(rm), list(saes))
        for site, sae in saes.items():
            arms = {
                "chosen": response_of(rm, sae, site, target, clean, layout),
                "rejected": response_of(rm, sae, site, target, clean, control),
            }
            at[site].append(Twin(target.key, arms, {}, None))  # type: ignore[arg-type]
    of_sites: list[Mediators] = []
    for site, sae in saes.items():
        group, share = _grow(rm, sae, site, at[site], reported[site])
        if group:
            of_sites.append(Mediators(site, group, matched_groups(sae, at[site], group, MATCHED_SETS), share))
    return max(of_sites, key=lambda m: m.share, default=None)


def _grow(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], features: Sequence[int]) -> tuple[list[int], float]:
    """G at a site, and the share that it mediates."""
    group, mediated = list[int](), 0.0
    able = list(features)
    while able and len(group) < MOST_MEDIATORS:
        shares = _shares(rm, sae, site, twins, [[*group, j] for j in able])
        order = sorted(range(len(able)), key=lambda i: -shares[i])
        best, share = able[order[0]], shares[order[0]]
        if share < mediated + LEAST_SHARE:
            break
        group, mediated = [*group, best], share
        able = [able[i] for i in order[1:CANDIDATES]]
    return group, mediated


def _shares(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> list[float]:
    """The share of the mean gain that each group mediates; 0 where there is no gain."""
    rows = mediation(rm, sae, site, twins, groups).mean(1)
    return [1 - without / gain if gain > 0 else 0.0 for gain, without in rows.tolist()]


def response_of(rm: RewardModel, sae: Sae, site: str, target: Target, clean: CleanRun, layout: Layout) -> Response:
    """The bad text with phrases, ready for ablation over the whole response. ``clean`` is the run of the text alone."""
    ids = target.ids(rm, layout)
    text = run_from_prefix(rm, clean, ids, list(clean.streams))
    return at_site(sae, text, site, response_start(rm, text.ids, rm.text_ids(target.pair.prompt, "")))


def ablated_rewards(
    rm: RewardModel, sae: Sae, site: str, response: Response, groups: Sequence[Sequence[int]]
) -> tuple[float, list[float]]:
    """The reward as it is, and with each group ablated."""
    effects = ablate_groups(rm, sae, response, site, groups).tolist()
    return response.text.reward, [response.text.reward - effect for effect in effects]


def mediated_gain(table: pl.DataFrame, jailbreak: str, control: str) -> MediatedGain:
    """U of one arm over another, the share that G mediates, and the shares of the matched sets.

    ``table`` has one row per prompt and arm: key, arm, reward, without (reward with G ablated), matched (with each set
    ablated). Intervals are from a bootstrap by prompt.
    """
    both = (
        table.filter(pl.col("arm") == jailbreak)
        .join(table.filter(pl.col("arm") == control), on="key", suffix="_control")
        .sort("key")
    )
    gain = (both["reward"] - both["reward_control"]).to_numpy()
    u = interval(gain, unit="reward")
    assert u.low is not None
    assert u.high is not None
    if u.low <= 0 <= u.high:
        return MediatedGain(jailbreak, control, both.height, u, None, None, None)
    keys = both["key"].to_list()

    def share_of(without: np.ndarray) -> Figure:
        return mediated_share(np.stack([gain, without], 1), keys)

    share = share_of((both["without"] - both["without_control"]).to_numpy())
    sets = np.array(both["matched"].to_list()) - np.array(both["matched_control"].to_list())
    shares = [share_of(one) for one in sets.T] if sets.size else []
    if not shares:
        return MediatedGain(jailbreak, control, both.height, u, share, None, None)
    values = [float(s.value or 0.0) for s in shares]
    matched = MatchedShares(len(shares), float(np.mean(values)), shares[int(np.argmax(values))])
    clear = share.low is not None and all(s.high is not None and share.low > s.high for s in shares)
    return MediatedGain(jailbreak, control, both.height, u, share, matched, clear)
