"""Before and after an edit: what it does to the biases it is for, and what it does to everything else.

The same texts are run under several *variants* of one PM: the PM as it is (``before``), with the patch (``edit``), and with
controls. Each variant has its own Δr. Intervals are 95 %, by bootstrap over prompts; differences are paired.

- Bias: each cue's ATE over twins (docs/method.md, "Planted bias"), and the share of it that the variant takes away.
- Accuracy on pairs, and its fall under the variant (positive where the variant is worse).
- Drift on the same pairs: mean |change of Δr| in SD(Δr) of the PM as it is; the correlation of Δr before and after.
- RM-Bench (Liu et al. 2024, arXiv:2410.16184): accuracy by the styles of the chosen and the rejected answer.

Controls edit other features, matched in firing and mass; equal ones count once. Where a rule chose the features of the patch
for a cue, the same rule chooses those of a control (:func:`.choice.choose_controls`). Where they were named, a control is a
random draw and has the patch's operation. Patches for cues have a second control, which needs no SAE: with d the mean stream
over the cues' windows minus that over the fillers', it sets the stream's part along d to the fillers' mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.evaluation.selection import Responses, matched_controls, profile
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.sites import Edit
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import SIDES, Pair, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.pairs.readers import load_pairs
from rmscope.planted.twins import Twin
from rmscope.run.run import Run
from rmscope.statistics import Array, Figure, correlation, interval, ratio
from rmscope.studies.edit.choice import Fitted, choose_controls, distinct_edits, join_edits
from rmscope.studies.edit.patch import FeatureEdit, edits_by_site
from rmscope.studies.edit.result import BEFORE, EDIT, BeforeAfter, CueChoice, StyleCell
from rmscope.studies.edit.settings import EditConfig

Variant = Mapping[str, Edit]
"""By site: edits of the stream."""
TWINS = 64
"""Twins on which a cue is measured, in held-out wordings."""
MATCHED, PROFILED = 3, 100
"""Sets of matched features beside a patch, at most; stored pairs on which they are matched where features were named."""


def before_after(
    run: Run,
    edits: Sequence[FeatureEdit],
    plants: Sequence[Plant],
    chosen: Sequence[CueChoice],
    fitted: Sequence[Fitted],
    config: EditConfig,
) -> BeforeAfter:
    """Figures of each cue, each set of pairs and each cell of RM-Bench under every variant (:func:`edit_variants`)."""
    rm, cues, pairs = run.rm, {}, {}
    measuring = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    variants = edit_variants(run, edits, chosen, fitted)
    sets = own_pairs(run)
    if config.pairs is not None:
        sets[config.pairs] = load_pairs(config.pairs, limit=config.limit)
    bench = load_pairs(config.rm_bench) if config.rm_bench is not None else []
    with run.display.stage("check") as progress:
        for plant in plants:
            texts = twins(measuring, plant, TWINS, run.config.seed)
            rewards = rewards_under(rm, variants, rm.tokenize_all(texts), progress, f"cue {plant.name}")
            cues[plant.name] = cue_figures(deltas(rewards), [p.prompt_key for p in texts])
        for name, given in sets.items():
            fitting = [(p.prompt_key, t) for p, t in zip(given, rm.tokenize_all(given), strict=True) if rm.fits(t)]
            rewards = rewards_under(rm, variants, [t for _, t in fitting], progress, name)
            pairs[name] = pair_figures(deltas(rewards), [prompt for prompt, _ in fitting], run.sd)
        return BeforeAfter(run.sd, cues, pairs, bench_cells(rm, variants, bench, progress))


def own_pairs(run: Run) -> dict[str, list[Pair]]:
    """Clean pairs that had no part in any choice: the demo's without cues, and the run's own unless it is on demo data."""
    sets = {"demo pairs without cues": [p for p in plain_demo_pairs() if split_of(p) == "measure"]}
    if not run.config.data.startswith("demo:"):
        sets["the run's measure split"] = [run.pairs[i] for i in run.of_split("measure")]
    return sets


def edit_variants(
    run: Run, edits: Sequence[FeatureEdit], chosen: Sequence[CueChoice], fitted: Sequence[Fitted]
) -> dict[str, Variant]:
    """A patch and its controls, by name: sets of matched features, and for cues the mean-difference projection at the site
    of the first edit. ``chosen`` and ``fitted`` have one entry per cue; they are empty where features were named."""
    variants: dict[str, Variant] = {EDIT: edits_by_site(run.saes, edits)}
    if chosen:
        variants["mean difference"] = {edits[0].site: mean_difference([t[edits[0].site] for t in fitted])}
        controls = [join_edits(c) for c in choose_controls(run.rm, run.saes, chosen, fitted, MATCHED)]
    else:
        draws = [draw_controls(run, edit) for edit in edits]
        controls = [
            tuple(replace(edit, features=tuple(others)) for edit, others in zip(edits, sets, strict=True))
            for sets in zip(*draws, strict=True)
        ]
    for i, control in enumerate(distinct_edits(controls), 1):
        variants[f"matched {i}"] = edits_by_site(run.saes, control)
    return variants


def draw_controls(run: Run, edit: FeatureEdit) -> list[list[int]]:
    """:data:`MATCHED` random draws of other features that match those of an edit on stored responses. The edit's features
    were named, not chosen for what they do on some texts, so a draw is a fair match."""
    # Features are matched on rates and mass alone, so the place where endings begin does not matter.
    sae, responses = run.saes[edit.site], Responses(run.store, edit.site, set(range(PROFILED)))
    like, features = profile(sae, responses, lambda _pair, _side: 1 << 30), np.array(edit.features)
    return [matched_controls(like, features, seed).tolist() for seed in range(MATCHED)]


def mean_difference(twins: Sequence[Sequence[Twin]]) -> Edit:
    """Projects the mean difference of each list of twins (one list per cue) out of the stream, at every token: the part
    along these directions becomes its average over the fillers' windows."""
    windows = [[torch.cat([t.responses[s].x[t.windows[s]] for t in cue]).mean(0) for s in SIDES] for cue in twins]
    basis = torch.linalg.qr(torch.stack([cue - filler for cue, filler in windows], 1).double())[0].float()
    centre = torch.stack([filler for _, filler in windows]).mean(0)

    def edit(x: Tensor) -> Tensor:
        b = basis.to(x.device)
        return x - ((x.float() - centre.to(x.device)) @ b @ b.t()).to(x.dtype)

    return edit


@torch.no_grad()
def rewards_under(
    rm: RewardModel,
    variants: Mapping[str, Variant],
    tokens: Sequence[PairTokens],
    progress: Progress = silent,
    note: str = "",
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
            rest = {site: _sparing(edit, first) for site, edit in edits.items() if site != lowest}
            start = _sparing(edits[lowest], first)(x) if lowest in edits else x
            with rm.edit_batch(batch, rest):
                rewards = rm.rewards_from(batch, lowest, start).cpu().tolist()
            for text, reward in zip(batch.texts, rewards, strict=True):
                out[name][text.side][text.pair] = reward
        done += len(batch.texts)
        progress(done // 2, len(tokens), note)
    return out


def _sparing(edit: Edit, first: Tensor) -> Edit:
    """The edit at every token except the first of a text."""
    return lambda x: torch.where(first, x, edit(x))


def deltas(rewards: Mapping[str, Mapping[str, Array]]) -> dict[str, Float[Array, " pairs"]]:
    """Δr of every pair under each variant."""
    return {name: sides["chosen"] - sides["rejected"] for name, sides in rewards.items()}


def cue_figures(deltas: Mapping[str, Array], prompts: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """A cue's ATE under each variant, and the share of it that is gone, from Δr of its twins [twins]."""
    before = deltas[BEFORE]
    return {
        name: {"ate": interval(delta, prompts, unit="reward"), "gone": ratio(before - delta, before, prompts)}
        for name, delta in deltas.items()
    }


def pair_figures(deltas: Mapping[str, Array], prompts: Sequence[str], sd: float) -> dict[str, dict[str, Figure]]:
    """Accuracy, its fall, and drift under each variant, from Δr [pairs]. ``sd`` is SD(Δr) of the PM as it is."""
    before, figures = deltas[BEFORE], {}
    for name, delta in deltas.items():
        both = np.stack([before, delta], 1)
        figures[name] = _accuracy_figures(before, delta, prompts) | {
            "drift": interval(np.abs(delta - before) / sd, prompts, unit="SD(Δr)"),
            "correlation": interval(both, prompts, lambda v: correlation(v[:, 0], v[:, 1])),
        }
    return figures


def _accuracy_figures(before: Array, delta: Array, prompts: Sequence[str]) -> dict[str, Figure]:
    was, hits = ((d > 0) + 0.5 * (d == 0) for d in (before, delta))
    return {"accuracy": interval(hits, prompts), "fall": interval(was - hits, prompts)}


def bench_cells(
    rm: RewardModel, variants: Mapping[str, Variant], bench: Sequence[Pair], progress: Progress = silent
) -> list[StyleCell]:
    """RM-Bench over the prompts whose answers in every style fit into the PM's context. Only pairs of one style are run."""
    one_style = [p for p in bench if p.meta["style_chosen"] == p.meta["style_rejected"]]
    if not one_style:
        return []
    tokens, styles = rm.tokenize_all(one_style), [p.meta["style_chosen"] for p in one_style]
    prompts = [p.id.rpartition(":")[0] for p in one_style]
    fitting = Counter(prompt for prompt, t in zip(prompts, tokens, strict=True) if rm.fits(t))
    places = [i for i, prompt in enumerate(prompts) if fitting[prompt] == len(set(styles))]
    rewards = rewards_under(rm, variants, [tokens[i] for i in places], progress, "RM-Bench")
    return style_cells(rewards, [styles[i] for i in places], [prompts[i] for i in places])


def style_cells(
    rewards: Mapping[str, Mapping[str, Array]], styles: Sequence[str], prompts: Sequence[str]
) -> list[StyleCell]:
    """One cell per style of the chosen and of the rejected answer. Every prompt has one pair of one style in each style."""
    at = {style: np.flatnonzero(np.array(styles) == style) for style in dict.fromkeys(styles)}
    groups, cells = np.array(prompts)[at[styles[0]]].tolist(), []
    for chosen, rejected in product(at, at):
        delta = {name: r["chosen"][at[chosen]] - r["rejected"][at[rejected]] for name, r in rewards.items()}
        figures = {name: _accuracy_figures(delta[BEFORE], d, groups) for name, d in delta.items()}
        cells.append(StyleCell(chosen, rejected, len(groups), figures))
    return cells
