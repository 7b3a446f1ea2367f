"""Twins ready for measuring: the same response with a cue and with filler, and with the cue's words but no cue.

The *window* of a cue, of its filler, or of a hard negative's words is its tokens and the next 3. For agreement it ends at
the read position. Defined in `docs/method.md`, Planted bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Response, at_site, clean_runs
from rmscope.effects.across import Members, ablate_members
from rmscope.evaluation.selection import match_by_traits
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair, Side
from rmscope.pairs.plants import Plant
from rmscope.sae.base import Active, Sae
from rmscope.statistics import Array

WINDOW = 3
"""Tokens after the cue that still count as its window."""
Peaks = tuple[Array, Array]
"""The largest activations in the windows with the cue, and in those without it."""


@dataclass(frozen=True, slots=True)
class Twin:
    """One twin at one site. ``chosen`` holds the cue, ``rejected`` the filler."""

    prompt: str
    responses: Mapping[Side, Response]
    windows: Mapping[Side, Tensor]
    """The cue's and the filler's window [span]."""
    negative: Negative | None
    ablated: dict[tuple[Side, tuple[tuple[str, tuple[int, ...]], ...]], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Effects of ablations by side and by the features that fire at each site: many groups have these in common."""

    @property
    def delta(self) -> float:
        """Reward with the cue minus with the filler."""
        return self.responses["chosen"].text.reward - self.responses["rejected"].text.reward


@dataclass(frozen=True, slots=True)
class Negative:
    """The same response with the cue's words in another use: what fires in their window, and the response's reward."""

    active: Active
    reward: float


Prepared = Mapping[str, Sequence[Twin]]
"""A plant's twins at each site."""


def prepare(rm: RewardModel, saes: Mapping[str, Sae], twins: Sequence[Pair], plant: Plant) -> dict[str, list[Twin]]:
    """The plant's twins at every site: clean runs, features and windows. The cue is on the chosen side of ``twins``."""
    prepared: dict[str, list[Twin]] = {site: [] for site in saes}
    for pair in twins:
        meta, tokens = pair.meta["plant"], rm.tokenize(pair)
        texts = clean_runs(rm, tokens, list(saes))
        spans: dict[Side, list[int]] = {"chosen": meta["cue"], "rejected": meta["filler"]}
        inside = {s: _window(rm, pair, pair.side(s), tokens.side(s), spans[s], plant) for s in SIDES}
        windows = {s: inside[s][tokens.divergence : texts[s].ids.numel()] for s in SIDES}
        words: dict[str, Negative] = {}
        if "negative" in meta:
            response, span = meta["negative"]
            both = rm.tokenize(replace(pair, rejected=response))
            shared = min(both.shared, texts["chosen"].ids.numel(), rm.read_position(both.rejected))
            text = rm.prefill(both.rejected, list(saes), texts["chosen"], shared)
            window = _window(rm, pair, response, both.rejected, span, plant)[: text.ids.numel()]
            actives = {site: sae.active(text.streams[site][window].float().cpu()) for site, sae in saes.items()}
            words = {site: Negative(active, text.reward) for site, active in actives.items()}
        for site, sae in saes.items():
            responses = {s: at_site(sae, texts[s], site, tokens.divergence) for s in SIDES}
            prepared[site].append(Twin(pair.prompt_key, responses, windows, words.get(site)))
    return prepared


def _window(rm: RewardModel, pair: Pair, response: str, ids: Tensor, span: Sequence[int], plant: Plant) -> Tensor:
    """Which of the text's tokens [T] are in the window of the characters ``span`` of the response."""
    cuts = [rm.text_ids(pair.prompt, response[:place]) for place in span]
    first, last = (int((ids[: len(cut)] == cut[: len(ids)]).cumprod(0).sum()) for cut in cuts)  # leading tokens in common
    inside = torch.zeros(ids.numel(), dtype=torch.bool)
    inside[max(0, first - 1) : ids.numel() if plant.kind == "agree" else last + WINDOW] = True
    return inside


def halves(twins: Sequence[Twin]) -> tuple[list[Twin], list[Twin]]:
    """The fitting and the measuring half, by prompt."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(t.prompt for t in twins))}
    fitting, measuring = ([t for t in twins if order[t.prompt] % 2 == half] for half in (0, 1))
    return fitting, measuring


def all_peaks(twins: Sequence[Twin], m: int) -> Peaks:
    """The largest f_j in the window: [twins, m] with the cue, [others, m] with filler or the words of hard negatives."""
    cue = [_largest(t.responses["chosen"].active, m, t.windows["chosen"]) for t in twins]
    without = [_largest(t.responses["rejected"].active, m, t.windows["rejected"]) for t in twins]
    without += [_largest(t.negative.active, m) for t in twins if t.negative]
    return torch.stack(cue).double().numpy(), torch.stack(without).double().numpy()


def _largest(active: Active, m: int, window: Tensor | None = None) -> Tensor:
    """The largest activation of every feature [m] in a window [span], or in all of the text; 0 where it is silent."""
    keep = slice(None) if window is None else window[active.token]
    return torch.zeros(m).scatter_reduce_(0, active.feature[keep], active.value[keep], "amax")


def scaled_peaks(twins: Sequence[Twin], features: list[int], m: int) -> list[dict[int, Peaks]]:
    """The peaks of some features on the fitting and the measuring half, over the largest f_j on the fitting half."""
    both, scaled = halves(twins), list[dict[int, Peaks]]()
    top = torch.stack([_largest(t.responses[s].active, m) for t in both[0] for s in SIDES]).amax(0).double().numpy()
    scale = np.where(top > 0, top, 1.0)[features]
    for half in both:
        cue, without = (peaks[:, features] / scale for peaks in all_peaks(half, m))
        scaled.append({j: (cue[:, i], without[:, i]) for i, j in enumerate(features)})
    return scaled


def localises(twins: Sequence[Twin], feature: int) -> float:
    """The share of the feature's activation on responses with the cue that is in the cue's window."""
    inside = total = 0.0
    for twin in twins:
        active, window = twin.responses["chosen"].active, twin.windows["chosen"]
        fires = active.feature == feature
        total += float(active.value[fires].sum())
        inside += float(active.value[fires & window[active.token]].sum())
    return inside / total if total else 0.0


def mediation(
    rm: RewardModel, saes: Mapping[str, Sae], prepared: Prepared, groups: Sequence[Members]
) -> Float[Array, "groups twins 2"]:
    """Each twin's Δr as it is, and with a group ablated from both sides, at all sites of the group at once."""
    twins = next(iter(prepared.values()))
    rows = np.zeros((len(groups), len(twins), 2))
    for i, twin in enumerate(twins):
        at_sites = {site: of_site[i] for site, of_site in prepared.items()}
        chosen, rejected = (group_effects(rm, saes, at_sites, s, groups) for s in SIDES)
        rows[:, i, 0] = twin.delta
        rows[:, i, 1] = twin.delta - chosen + rejected
    return rows


def group_effects(
    rm: RewardModel, saes: Mapping[str, Sae], at_sites: Mapping[str, Twin], side: Side, groups: Sequence[Members]
) -> Float[Array, " groups"]:
    """The effect of ablating each group from a twin's response; ablations that were done before are not run again."""
    fires = {site: set(twin.responses[side].features().tolist()) for site, twin in at_sites.items()}
    wanted = [tuple((s, tuple(sorted(fires[s].intersection(of)))) for s, of in group.items()) for group in groups]
    wanted = [tuple((site, firing) for site, firing in of if firing) for of in wanted]
    done = next(iter(at_sites.values())).ablated
    new = [of for of in dict.fromkeys(wanted) if (side, of) not in done]
    responses = {site: twin.responses[side] for site, twin in at_sites.items()}
    effects = ablate_members(rm, saes, responses, [dict(of) for of in new])
    done.update(zip([(side, of) for of in new], effects.tolist(), strict=True))
    return np.array([done[side, of] for of in wanted])


def matched_groups(
    sae: Sae, twins: Sequence[Twin], group: Sequence[int], n: int, forbidden: Sequence[int] | None = None
) -> list[list[int]]:
    """``n`` groups of features, each member matched to one of the group's, the first of which have the first choice. None
    holds a feature of ``forbidden`` (left out: of the group).

    They match in the number of responses with the cue and with filler in which they fire, and in their mass Σ_t f_tj |d_j|.
    """
    traits = np.zeros((sae.m, 3))
    norms = sae.W_dec.norm(dim=1)
    for twin in twins:
        for column, side in enumerate(SIDES):
            active = twin.responses[side].active
            traits[active.feature.unique().numpy(), column] += 1
            np.add.at(traits[:, 2], active.feature.numpy(), (active.value * norms[active.feature]).numpy())
    smoothed = traits + np.array([1.0, 1.0, 1e-9])
    forbidden = group if forbidden is None else forbidden
    return [match_by_traits(smoothed, traits[:, 2] > 0, group, forbidden, seed).tolist() for seed in range(n)]
