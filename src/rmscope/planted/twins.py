"""Twins ready for measuring: the same response with a cue and with filler, and with the cue's words but no cue.

The *window* of a cue, of its filler, or of a hard negative's words is its tokens and the next 3. For agreement it ends at
the read position. Defined in `docs/method.md`, Planted bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rmscope.effects.ablation import Response, ablate_groups, at_site, prefill_pair
from rmscope.evaluation.controls import match_by_traits
from rmscope.model.rendering import encode, pair_tokens, render
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair, Side
from rmscope.pairs.plants import Plant
from rmscope.sae.base import Active, Sae
from rmscope.statistics import Array

WINDOW = 3
"""Tokens after the cue that still count as its window."""


@dataclass(frozen=True, slots=True)
class Twin:
    """One twin at one site. ``chosen`` holds the cue, ``rejected`` the filler."""

    prompt: str
    responses: Mapping[Side, Response]
    windows: Mapping[Side, Tensor]
    """The cue's and the filler's window [span]."""
    negative: Negative | None
    ablated: dict[tuple[Side, tuple[int, ...]], float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Effects of ablating features of the site's SAE, by side and by those of the features that fire there. They are kept
    because many groups have these in common."""

    @property
    def delta(self) -> float:
        """Reward with the cue minus with the filler."""
        return self.responses["chosen"].text.reward - self.responses["rejected"].text.reward


@dataclass(frozen=True, slots=True)
class Negative:
    """The same response with the cue's words in another use: what fires in their window, and the response's reward."""

    active: Active
    reward: float


def prepare(rm: RewardModel, saes: Mapping[str, Sae], twins: Sequence[Pair], plant: Plant) -> dict[str, list[Twin]]:
    """The plant's twins at every site: clean runs, features and windows. The cue is on the chosen side of ``twins``."""
    prepared: dict[str, list[Twin]] = {site: [] for site in saes}
    for pair in twins:
        meta, prompt = pair.meta["plant"], pair.prompt_key
        tokens = rm.tokenize(pair)
        texts = prefill_pair(rm, tokens, list(saes))
        spans: dict[Side, list[int]] = {"chosen": meta["cue"], "rejected": meta["filler"]}
        inside = {s: _window(rm, pair, pair.side(s), tokens.side(s), spans[s], plant) for s in SIDES}
        windows = {s: inside[s][tokens.divergence : texts[s].ids.numel()] for s in SIDES}
        negative, window = None, torch.zeros(0, dtype=torch.bool)
        if "negative" in meta:
            response, span = meta["negative"]
            ids = encode(rm.rendering, rm.tokenizer, [render(rm.rendering, rm.tokenizer, pair.prompt, response)])[0]
            both = pair_tokens(tokens.chosen.tolist(), ids)
            shared = min(both.shared, texts["chosen"].ids.numel(), rm.read_position(both.rejected))
            negative = rm.prefill(both.rejected, list(saes), texts["chosen"], shared)
            window = _window(rm, pair, response, both.rejected, span, plant)[: negative.ids.numel()]
        for site, sae in saes.items():
            responses = {s: at_site(sae, texts[s], site, tokens.divergence) for s in SIDES}
            words = None
            if negative:
                words = Negative(sae.active(negative.streams[site][window].float().cpu()), negative.reward)
            prepared[site].append(Twin(prompt, responses, windows, words))
    return prepared


def _window(rm: RewardModel, pair: Pair, response: str, ids: Tensor, span: Sequence[int], plant: Plant) -> Tensor:
    """Which of the text's tokens [T] are in the window of the characters ``span`` of the response."""
    first, last = (_token_at(rm, pair, response[:cut], ids) for cut in span)
    inside = torch.zeros(ids.numel(), dtype=torch.bool)
    inside[max(0, first - 1) : ids.numel() if plant.kind == "agree" else last + WINDOW] = True
    return inside


def _token_at(rm: RewardModel, pair: Pair, beginning: str, ids: Tensor) -> int:
    """How many leading tokens the text shares with the text cut after ``beginning``."""
    cut = encode(rm.rendering, rm.tokenizer, [render(rm.rendering, rm.tokenizer, pair.prompt, beginning)])[0]
    same = [int(a) == b for a, b in zip(ids, cut, strict=False)]
    return same.index(False) if False in same else len(same)


def halves(twins: Sequence[Twin]) -> tuple[list[Twin], list[Twin]]:
    """The fitting and the measuring half, by prompt."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(t.prompt for t in twins))}
    fitting, measuring = ([t for t in twins if order[t.prompt] % 2 == half] for half in (0, 1))
    return fitting, measuring


def largest(twin: Twin, side: Side, feature: int) -> float:
    """The feature's largest activation on a response; 0 where it is silent."""
    return _top(twin.responses[side].active, feature)


def _top(active: Active, feature: int, where: Tensor | None = None) -> float:
    mine = active.feature == feature
    values = active.value[mine if where is None else mine & where]
    return float(values.max()) if values.numel() else 0.0


def peaks(twins: Sequence[Twin], group: Sequence[int], scale: Mapping[int, float]) -> tuple[Array, Array]:
    """The largest f_j / scale_j in the window over the group's features: with the cue [twins], and without it [others].

    The others are the windows of the filler and of the hard negatives.
    """
    cue, without = list[float](), list[float]()
    for t in twins:
        for side, out in (("chosen", cue), ("rejected", without)):
            active, window = t.responses[side].active, t.windows[side]  # type: ignore[index]
            out.append(max(_top(active, j, window[active.token]) / scale[j] for j in group))
        if t.negative:
            without.append(max(_top(t.negative.active, j) / scale[j] for j in group))
    return np.array(cue), np.array(without)


def all_peaks(twins: Sequence[Twin], m: int) -> tuple[Array, Array]:
    """The largest f_j in the window for every single feature: [twins, m] with the cue, [others, m] without it."""
    cue, without = list[Tensor](), list[Tensor]()
    for t in twins:
        for side, out in (("chosen", cue), ("rejected", without)):
            active, window = t.responses[side].active, t.windows[side]  # type: ignore[index]
            out.append(_tops(active, m, window[active.token]))
        if t.negative:
            without.append(_tops(t.negative.active, m))
    return torch.stack(cue).numpy(), torch.stack(without).numpy()


def _tops(active: Active, m: int, where: Tensor | None = None) -> Tensor:
    feature, value = (t if where is None else t[where] for t in (active.feature, active.value))
    return torch.zeros(m).scatter_reduce_(0, feature, value, "amax")


def localises(twins: Sequence[Twin], feature: int) -> float:
    """The share of the feature's activation on responses with the cue that is in the cue's window."""
    inside = total = 0.0
    for twin in twins:
        a, window = twin.responses["chosen"].active, twin.windows["chosen"]
        mine = a.feature == feature
        total += float(a.value[mine].sum())
        inside += float(a.value[mine & window[a.token]].sum())
    return inside / total if total else 0.0


def mediation(rm: RewardModel, sae: Sae, site: str, twins: Sequence[Twin], groups: Sequence[Sequence[int]]) -> Array:
    """[groups, twins, 2]: each twin's Δr as it is, and with a group ablated from both sides."""
    rows = np.zeros((len(groups), len(twins), 2))
    for i, twin in enumerate(twins):
        chosen, rejected = (_ablated(rm, sae, site, twin, s, groups) for s in SIDES)
        rows[:, i, 0] = twin.delta
        rows[:, i, 1] = twin.delta - chosen + rejected
    return rows


def _ablated(rm: RewardModel, sae: Sae, site: str, twin: Twin, side: Side, groups: Sequence[Sequence[int]]) -> Array:
    """Effect of ablating each group from a twin's response [groups]; ablations that were done before are not run again."""
    fires = set(twin.responses[side].features().tolist())
    wanted = [(side, tuple(sorted(fires.intersection(group)))) for group in groups]
    new = [key for key in dict.fromkeys(wanted) if key not in twin.ablated]
    effects = ablate_groups(rm, sae, twin.responses[side], site, [firing for _, firing in new])
    twin.ablated.update(zip(new, effects.tolist(), strict=True))
    return np.array([twin.ablated[key] for key in wanted])


def matched_groups(sae: Sae, twins: Sequence[Twin], group: Sequence[int], n: int) -> list[list[int]]:
    """``n`` groups of other features. Each member is matched to one of the group's.

    They are matched by the number of responses with the cue and with filler in which they fire, and by their mass
    Σ_t f_tj |d_j| there.
    """
    traits = np.zeros((sae.m, 3))
    norms = sae.W_dec.norm(dim=1)
    for twin in twins:
        for column, side in enumerate(SIDES):
            active = twin.responses[side].active
            traits[active.feature.unique().numpy(), column] += 1
            np.add.at(traits[:, 2], active.feature.numpy(), (active.value * norms[active.feature]).numpy())
    smoothed = traits + np.array([1.0, 1.0, 1e-9])
    return [match_by_traits(smoothed, traits[:, 2] > 0, group, group, seed).tolist() for seed in range(n)]
