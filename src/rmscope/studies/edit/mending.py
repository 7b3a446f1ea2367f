"""Before and after an edit: what it does to the biases it is for, and what it does to everything else.

Every figure compares the same texts under several *variants* of one PM: as it is, with the patch, and with what stands
beside it. Δr of a variant is its own; the unit is SD(Δr) of the PM as it is. Intervals are 95 %, bootstrap by prompt;
differences are paired.

- Bias: each cue's ATE over twins (METHOD, "Planted bias"), and the share of it that the variant takes away.
- Accuracy on pairs, and how much of it the variant costs (falls are positive).
- Drift on the same pairs: mean |change of Δr| in SD(Δr), and the correlation of Δr before and after.
- RM-Bench: accuracy by the styles of the chosen and the rejected answer.

Beside a patch that was made for cues stand a mean-difference projection, which needs no SAE (the stream's mean over cues'
windows less that over fillers' is projected out at the patch's site, to where fillers lie on it), and features matched to
the edited ones, edited likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.sites import Edit, edited
from rmscope.pairs.pair import SIDES
from rmscope.planted.twins import Twin
from rmscope.sae.base import Sae
from rmscope.statistics import Array, bootstrap, correlation, ratio_interval
from rmscope.studies.edit.patch import FeatureEdit, edit_at

Variant = Mapping[str, Edit]
"""Edits by site."""
BEFORE = "before"
MATCHED = 3
"""Sets of matched features beside a patch."""


@torch.no_grad()
def rewards_under(
    rm: RewardModel, variants: Mapping[str, Variant], tokens: Sequence[PairTokens], progress: Progress = silent
) -> dict[str, dict[str, Float[Array, " pairs"]]]:
    """r of either side under every variant, and as the PM is (``before``): blocks up to the lowest site run once for all."""
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
            with edited(rm.blocks, rest):
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
    """The edit at every token but a text's first."""
    return lambda x: torch.where(first, x, edit(x))


def bias(deltas: Mapping[str, Array], prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A cue's ATE [twins] under each variant, and the share of it that is gone."""
    groups, before = np.array(prompts), deltas[BEFORE]
    rows = {}
    for name, delta in deltas.items():
        low, high = ratio_interval(before - delta, before, groups)
        gone = {"value": float(1 - delta.mean() / before.mean()), "low": low, "high": high}
        rows[name] = {"ate": _interval(delta, groups), "gone": gone}
    return rows


def elsewhere(deltas: Mapping[str, Array], prompts: Sequence[str], sd: float) -> dict[str, dict[str, Any]]:
    """Accuracy, its fall, and drift on pairs, under each variant; ``sd`` is SD(Δr) of the PM as it is."""
    groups, before = np.array(prompts), deltas[BEFORE]
    rows = {}
    for name, delta in deltas.items():
        together = np.stack([before, delta], 1)
        low, high = bootstrap(together, groups, lambda v: correlation(v[:, 0], v[:, 1]))
        rows[name] = {
            "accuracy": _interval(_hits(delta), groups),
            "fall": _interval(_hits(before) - _hits(delta), groups),
            "drift": _interval(np.abs(delta - before) / sd, groups),
            "correlation": {"value": correlation(before, delta), "low": low, "high": high},
        }
    return rows


def by_style(
    rewards: Mapping[str, Mapping[str, Array]], styles: Sequence[str], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """RM-Bench from its pairs of one style: a row a cell (style of the chosen, of the rejected), with each variant's
    accuracy over prompts and its fall."""
    order = list(dict.fromkeys(styles))
    at = {style: [i for i, s in enumerate(styles) if s == style] for style in order}
    groups = np.array([prompts[i] for i in at[order[0]]])
    rows = []
    for chosen, rejected in product(order, order):
        row: dict[str, Any] = {"chosen": chosen, "rejected": rejected, "pairs": len(groups)}
        hits = {name: _hits(r["chosen"][at[chosen]] - r["rejected"][at[rejected]]) for name, r in rewards.items()}
        for name, hit in hits.items():
            row[name] = {"accuracy": _interval(hit, groups), "fall": _interval(hits[BEFORE] - hit, groups)}
        rows.append(row)
    return rows


def _hits(delta: Array) -> Array:
    return (delta > 0) + 0.5 * (delta == 0)


def _interval(values: Array, groups: Array) -> dict[str, float]:
    """Mean with its interval, bootstrap by prompt."""
    low, high = bootstrap(values, groups, lambda v: float(v.mean()))
    return {"value": float(values.mean()), "low": low, "high": high}


def mean_difference(twins: Sequence[Sequence[Twin]]) -> Edit:
    """Projects the mean difference of each list of twins (a cue each) out of the stream, at every token.

    A stream's part along the directions becomes what it is on average in fillers' windows.
    """
    directions, centres = zip(*(_means(t) for t in twins), strict=True)
    basis = torch.linalg.qr(torch.stack(directions, 1).double())[0].float()
    centre = torch.stack(centres).mean(0)

    def edit(x: Tensor) -> Tensor:
        b = basis.to(x.device)
        return x - ((x.float() - centre.to(x.device)) @ b @ b.t()).to(x.dtype)

    return edit


def _means(twins: Sequence[Twin]) -> tuple[Tensor, Tensor]:
    """The stream's mean over cues' windows less that over fillers', and the latter [d]."""
    cue, filler = (torch.cat([t.responses[s].x[t.windows[s]] for t in twins]).mean(0) for s in SIDES)
    return cue - filler, filler


def variants_like(
    saes: Mapping[str, Sae], edits: Sequence[FeatureEdit], drawn: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Variant]:
    """Variants that edit other features likewise: ``drawn[e][i]`` stands for the features of edit e in variant i."""
    variants: dict[str, Variant] = {}
    for i in range(MATCHED):
        mine = [FeatureEdit(e.site, tuple(d[i]), e.operation, e.value) for e, d in zip(edits, drawn, strict=True)]
        sites = dict.fromkeys(e.site for e in mine)
        variants[f"matched {i + 1}"] = {s: edit_at(saes[s], [e for e in mine if e.site == s]) for s in sites}
    return variants
