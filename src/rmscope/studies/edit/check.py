"""The before/after check of a patch from a run: which texts, which variants, one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmscope.evaluation.controls import matched
from rmscope.evaluation.selection import Responses, profile
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import Twin, matched_groups
from rmscope.studies.edit.mending import (
    MATCHED,
    Variant,
    bias,
    by_style,
    deltas,
    elsewhere,
    mean_difference,
    rewards_under,
    variants_like,
)
from rmscope.studies.edit.patch import EditPatch

TWINS = 64
"""Twins a cue is measured on, in held-out wordings."""
PROFILED = 100
"""Stored pairs over which features are matched where no cue is edited."""


def variants(run: Any, patch: EditPatch, fitted: Sequence[Mapping[str, Sequence[Twin]]]) -> dict[str, Variant]:
    """``edit`` and what stands beside it: matched features; with cues (``fitted``: the twins of each by site) also the
    mean-difference projection, at the site of the first edit."""
    made: dict[str, Variant] = {"edit": patch.callables()}
    if fitted:
        site = patch.edits[0].site
        made["mean difference"] = {site: mean_difference([t[site] for t in fitted])}
    drawn = []
    for edit in patch.edits:
        sae = patch.saes[edit.site]
        if fitted:
            every = [t for prepared in fitted for t in prepared[edit.site]]
            drawn.append(matched_groups(sae, every, edit.features, MATCHED))
        else:
            # over the run's stored responses; where their endings begin plays no part in the match
            like = profile(sae, Responses(run.store, edit.site, set(range(PROFILED))), lambda _pair, _side: 1 << 30)
            features = np.array(edit.features)
            drawn.append([matched(like, features, features, seed).tolist() for seed in range(MATCHED)])
    return made | variants_like(patch.saes, patch.edits, drawn)


def own_pairs(run: Any) -> dict[str, list[Pair]]:
    """Clean pairs that had no part in any choice: the demo's without cues, and the run's own unless it studied those."""
    sets = {"demo pairs without cues": [p for p in plain_demo_pairs() if split_of(p) == "measure"]}
    if not run.config.data.startswith("demo:"):
        sets["the run's measure split"] = [run.pairs[i] for i in run.of_split("measure")]
    return sets


def before_after(
    rm: RewardModel,
    variants: Mapping[str, Variant],
    plants: Sequence[Plant],
    sets: Mapping[str, Sequence[Pair]],
    bench: Sequence[Pair],
    sd: float,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """``cues``, ``pairs`` and ``styles``: figures by name and variant (``mending.py``).

    ``bench`` is RM-Bench as it is read; only its pairs of one style are run, the others are made of their rewards.
    """
    measuring = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    cues, pairs = {}, {}
    for plant in plants:
        made = twins(measuring, plant, TWINS, seed)
        found = rewards_under(rm, variants, rm.tokenize_all(made), _named(progress, f"cue {plant.name}"))
        cues[plant.name] = bias(deltas(found), [str(p.meta["group"]) for p in made])
    for name, given in sets.items():
        tokens = rm.tokenize_all(given)
        kept = [i for i, t in enumerate(tokens) if rm.fits(t)]
        found = rewards_under(rm, variants, [tokens[i] for i in kept], _named(progress, name))
        prompts = [str(given[i].meta.get("group", given[i].first_human_turn())) for i in kept]
        pairs[name] = elsewhere(deltas(found), prompts, sd)
    return {"sd": sd, "cues": cues, "pairs": pairs, "styles": _styles(rm, variants, bench, _named(progress, "RM-Bench"))}


def _styles(
    rm: RewardModel, variants: Mapping[str, Variant], bench: Sequence[Pair], progress: Progress
) -> list[dict[str, Any]]:
    """RM-Bench over the prompts that have answers in every style, all within the PM's context."""
    alike = [p for p in bench if p.meta["style_chosen"] == p.meta["style_rejected"]]
    if not alike:
        return []
    tokens = rm.tokenize_all(alike)
    rows = [p.id.rpartition(":")[0] for p in alike]
    styles = len({p.meta["style_chosen"] for p in alike})
    whole = {
        row for row, n in Counter(row for row, t in zip(rows, tokens, strict=True) if rm.fits(t)).items() if n == styles
    }
    kept = [i for i, row in enumerate(rows) if row in whole]
    found = rewards_under(rm, variants, [tokens[i] for i in kept], progress)
    return by_style(found, [alike[i].meta["style_chosen"] for i in kept], [rows[i] for i in kept])


def _named(progress: Progress, what: str) -> Progress:
    def report(done: int, total: int, _note: str = "") -> None:
        progress(done, total, what)

    return report
