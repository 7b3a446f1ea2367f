"""Before and after an edit: what it does to the biases it is for, and what it does to everything else.

Every figure compares the same texts under several *variants* of one PM: the PM as it is (``before``), the PM with the patch
(``edit``), and controls. Each variant has its own Δr. The unit is SD(Δr) of the PM as it is. Intervals are 95 %, by
bootstrap over prompts; differences are paired.

- Bias: each cue's ATE over twins (``docs/method.md``, "Planted bias"), and the share of it that the variant takes away.
- Accuracy on pairs, and its fall under the variant (positive where the variant is worse).
- Drift on the same pairs: mean |change of Δr| in SD(Δr), and the correlation of Δr before and after.
- RM-Bench (Liu et al. 2024, arXiv:2410.16184): accuracy by the styles of the chosen and the rejected answer.

A patch that was made for cues has two controls. The first is a mean-difference projection, which needs no SAE. With d the
mean stream over the cues' windows minus the mean over the fillers', it sets the stream's part along d to the fillers' mean,
at the patch's site. The second is sets of features that match the edited ones and are edited in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.sites import Edit, edit_streams
from rmscope.pairs.pair import SIDES
from rmscope.planted.twins import Twin
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, correlation, interval, ratio
from rmscope.studies.edit.patch import FeatureEdit, edit_at
from rmscope.studies.edit.result import BEFORE, CueFigures, PairFigures, StyleCell, StyleFigures

Variant = Mapping[str, Edit]
"""Edits by site."""
MATCHED = 3
"""Sets of matched features beside a patch."""
REWARD, SD = "reward", "SD(Δr)"
"""Units."""


@torch.no_grad()
def rewards_under(
    rm: RewardModel, variants: Mapping[str, Variant], tokens: Sequence[PairTokens], progress: Progress = silent
) -> dict[str, dict[str, Float[Array, " pairs"]]]:
    """Rewards of both sides under every variant, and before. Blocks up to the lowest edited site run once for all."""
    named = {BEFORE: dict[str, Edit](), **variants}
    lowest = min((s for v in named.values() for s in v), key=rm.site_index)
    out: dict[str, dict[str, Array]] = {name: {s: np.zeros(len(tokens)) for s in SIDES} for name in named}
    done = 0
    for batch in rm.batches(tokens):
        first = (batch.positions == 0)[..., None].to(rm.device)
        x = rm.streams(batch, [lowest])[lowest]
        for name, edits in named.items():
            rest = {rm.site_index(site): _sparing(edit, first) for site, edit in edits.items() if site != lowest}
            start = _sparing(edits[lowest], first)(x) if lowest in edits else x
            with edit_streams(rm.blocks, rest):
                rewards = rm.rewards_from(batch, lowest, start).cpu().tolist()
            for text, reward in zip(batch.texts, rewards, strict=True):
                out[name][text.side][text.pair] = reward
        done += len(batch.texts)
        progress(done // 2, len(tokens), "pairs under every variant")
    return out


def deltas(rewards: Mapping[str, Mapping[str, Array]]) -> dict[str, Float[Array, " pairs"]]:
    """Δr of every pair under each variant."""
    return {name: sides["chosen"] - sides["rejected"] for name, sides in rewards.items()}


def _sparing(edit: Edit, first: Tensor) -> Edit:
    """The edit at every token except the first of a text."""
    return lambda x: torch.where(first, x, edit(x))


def cue_figures(deltas: Mapping[str, Array], prompts: Sequence[str]) -> dict[str, CueFigures]:
    """A cue's ATE under each variant, and the share of it that is gone, from Δr of its twins [twins]."""
    before = deltas[BEFORE]
    return {
        name: CueFigures(interval(delta, prompts, unit=REWARD), ratio(before - delta, before, prompts))
        for name, delta in deltas.items()
    }


def pair_figures(deltas: Mapping[str, Array], prompts: Sequence[str], sd: float) -> dict[str, PairFigures]:
    """Accuracy, its fall, and drift under each variant, from Δr [pairs]. ``sd`` is SD(Δr) of the PM as it is."""
    before = deltas[BEFORE]
    return {
        name: PairFigures(
            accuracy=interval(_hits(delta), prompts),
            fall=interval(_hits(before) - _hits(delta), prompts),
            drift=interval(np.abs(delta - before) / sd, prompts, unit=SD),
            correlation=_correlation(before, delta, prompts),
        )
        for name, delta in deltas.items()
    }


def _correlation(before: Array, delta: Array, prompts: Sequence[str]) -> Figure:
    return interval(np.stack([before, delta], 1), prompts, lambda v: correlation(v[:, 0], v[:, 1]))


def style_cells(
    rewards: Mapping[str, Mapping[str, Array]], styles: Sequence[str], prompts: Sequence[str]
) -> list[StyleCell]:
    """RM-Bench from its pairs of one style: one cell per style of the chosen and style of the rejected answer.

    Every prompt must have one pair in each style. The rewards of a cell's two styles are combined prompt by prompt.
    """
    order = list(dict.fromkeys(styles))
    at = {style: [i for i, s in enumerate(styles) if s == style] for style in order}
    groups = [prompts[i] for i in at[order[0]]]
    cells = []
    for chosen, rejected in product(order, order):
        hits = {name: _hits(r["chosen"][at[chosen]] - r["rejected"][at[rejected]]) for name, r in rewards.items()}
        variants = {
            name: StyleFigures(interval(hit, groups), interval(hits[BEFORE] - hit, groups)) for name, hit in hits.items()
        }
        cells.append(StyleCell(chosen, rejected, len(groups), variants))
    return cells


def _hits(delta: Array) -> Array:
    return (delta > 0) + 0.5 * (delta == 0)


def mean_difference(twins: Sequence[Sequence[Twin]]) -> Edit:
    """Projects the mean difference of each list of twins (one list per cue) out of the stream, at every token.

    The stream's part along these directions becomes its average over the fillers' windows.
    """
    directions, centres = zip(*(_means(t) for t in twins), strict=True)
    basis = torch.linalg.qr(torch.stack(directions, 1).double())[0].float()
    centre = torch.stack(centres).mean(0)

    def edit(x: Tensor) -> Tensor:
        b = basis.to(x.device)
        return x - ((x.float() - centre.to(x.device)) @ b @ b.t()).to(x.dtype)

    return edit


def _means(twins: Sequence[Twin]) -> tuple[Tensor, Tensor]:
    """The mean stream over the cues' windows minus that over the fillers', and the latter [d]."""
    cue, filler = (torch.cat([t.responses[s].x[t.windows[s]] for t in twins]).mean(0) for s in SIDES)
    return cue - filler, filler


def matched_variants(
    saes: Mapping[str, Sae], edits: Sequence[FeatureEdit], matched: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Variant]:
    """Variants that edit other features in the same way: ``matched[e][i]`` replaces the features of edit e in variant i."""
    variants: dict[str, Variant] = {}
    for i in range(MATCHED):
        like = [FeatureEdit(e.site, tuple(sets[i]), e.operation, e.value) for e, sets in zip(edits, matched, strict=True)]
        sites = dict.fromkeys(e.site for e in like)
        variants[f"matched {i + 1}"] = {s: edit_at(saes[s], [e for e in like if e.site == s]) for s in sites}
    return variants
