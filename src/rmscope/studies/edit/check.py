"""The before/after check of a patch from a run: which texts, which variants, one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rmscope.evaluation.controls import matched_controls
from rmscope.evaluation.selection import Responses, profile
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import Twin, matched_groups
from rmscope.run.run import Run
from rmscope.studies.edit.mending import (
    MATCHED,
    Variant,
    cue_figures,
    deltas,
    matched_variants,
    mean_difference,
    pair_figures,
    rewards_under,
    style_cells,
)
from rmscope.studies.edit.patch import EditPatch
from rmscope.studies.edit.result import EDIT, BeforeAfter, StyleCell

TWINS = 64
"""Twins on which a cue is measured, in held-out wordings."""
PROFILED = 100
"""Stored pairs on which features are matched where no cue is edited."""


def edit_variants(run: Run, patch: EditPatch, fitted: Sequence[Mapping[str, Sequence[Twin]]]) -> dict[str, Variant]:
    """The patch and its controls, by name: sets of matched features, and for cues the mean-difference projection at the site
    of the first edit. ``fitted`` holds the fitting twins of each cue by site; it is empty where the features were named."""
    variants: dict[str, Variant] = {EDIT: patch.callables()}
    if fitted:
        site = patch.edits[0].site
        variants["mean difference"] = {site: mean_difference([t[site] for t in fitted])}
    matched = []
    for edit in patch.edits:
        sae = patch.saes[edit.site]
        if fitted:
            every = [t for prepared in fitted for t in prepared[edit.site]]
            matched.append(matched_groups(sae, every, edit.features, MATCHED))
        else:
            # Features are matched on rates and mass alone, so the place where endings begin does not matter.
            like = profile(sae, Responses(run.store, edit.site, set(range(PROFILED))), lambda _pair, _side: 1 << 30)
            features = np.array(edit.features)
            matched.append([matched_controls(like, features, features, seed).tolist() for seed in range(MATCHED)])
    return variants | matched_variants(patch.saes, patch.edits, matched)


def own_pairs(run: Run) -> dict[str, list[Pair]]:
    """Clean pairs that had no part in any choice: the demo's without cues, and the run's own unless it is on demo data."""
    sets = {"demo pairs without cues": _measured_demo_pairs()}
    if not run.config.data.startswith("demo:"):
        sets["the run's measure split"] = [run.pairs[i] for i in run.of_split("measure")]
    return sets


def before_after(
    run: Run,
    variants: Mapping[str, Variant],
    plants: Sequence[Plant],
    sets: Mapping[str, Sequence[Pair]],
    bench: Sequence[Pair],
    progress: Progress = silent,
) -> BeforeAfter:
    """Figures of each cue, each set of pairs and each cell of RM-Bench under every variant (``mending.py``).

    Args:
        bench: RM-Bench as it is read. Only its pairs of one style are run; the other cells combine their rewards.
    """
    rm, measuring = run.rm, _measured_demo_pairs()
    cues, pairs = {}, {}
    for plant in plants:
        texts = twins(measuring, plant, TWINS, run.config.seed)
        rewards = rewards_under(rm, variants, rm.tokenize_all(texts), _named(progress, f"cue {plant.name}"))
        cues[plant.name] = cue_figures(deltas(rewards), [p.prompt_key for p in texts])
    for name, given in sets.items():
        fitting = [(p.prompt_key, t) for p, t in zip(given, rm.tokenize_all(given), strict=True) if rm.fits(t)]
        rewards = rewards_under(rm, variants, [t for _, t in fitting], _named(progress, name))
        pairs[name] = pair_figures(deltas(rewards), [prompt for prompt, _ in fitting], run.sd)
    return BeforeAfter(run.sd, cues, pairs, bench_cells(rm, variants, bench, _named(progress, "RM-Bench")))


def _measured_demo_pairs() -> list[Pair]:
    return [p for p in plain_demo_pairs() if split_of(p) == "measure"]


def bench_cells(
    rm: RewardModel, variants: Mapping[str, Variant], bench: Sequence[Pair], progress: Progress = silent
) -> list[StyleCell]:
    """RM-Bench over the prompts whose answers in every style fit into the PM's context."""
    one_style = [p for p in bench if p.meta["style_chosen"] == p.meta["style_rejected"]]
    if not one_style:
        return []
    tokens = rm.tokenize_all(one_style)
    rows = [p.id.rpartition(":")[0] for p in one_style]
    styles = len({p.meta["style_chosen"] for p in one_style})
    fitting = Counter(row for row, t in zip(rows, tokens, strict=True) if rm.fits(t))
    places = [i for i, row in enumerate(rows) if fitting[row] == styles]
    rewards = rewards_under(rm, variants, [tokens[i] for i in places], progress)
    return style_cells(rewards, [one_style[i].meta["style_chosen"] for i in places], [rows[i] for i in places])


def _named(progress: Progress, note: str) -> Progress:
    def report(done: int, total: int, _note: str = "") -> None:
        progress(done, total, note)

    return report
