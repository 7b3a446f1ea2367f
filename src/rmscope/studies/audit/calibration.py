"""What an audit must not find: anything much in PMs that learned nothing, and cues that were never planted.

Two PMs of the same base, pipeline and settings: one trained on the same pairs with labels drawn by coin, one with random
weights. And the matching rule on decoy cues in the PM that was audited: single words that no plant uses.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmscope.io import Progress, silent
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences, twins
from rmscope.pairs.plants import Plant
from rmscope.planted.matching import matches
from rmscope.planted.recall_metrics import KS, share
from rmscope.planted.twins import prepare
from rmscope.run.results import Results
from rmscope.studies.audit.scoring import Scoring

DECOYS = 100
DECOY_TWINS = 16
"""Twins a decoy is measured on: a hundred of them cost as much as a few plants."""


def reported_in(run: Results, data: Mapping[str, Any]) -> dict[str, Any]:
    """How many of a finished run's frozen features it reports; ``data`` is what the run returned."""
    return share(sum(s["reported"] for s in data["sites"]), sum(s["frozen"] for s in data["sites"])) | {"sd_delta": run.sd}


def decoys(pairs: Sequence[Pair], plants: Sequence[Plant], n: int, seed: int) -> list[Plant]:
    """``n`` words of the pairs' own text that stand in no plant, each as a cue of random sign."""
    taken = {word.strip(".,;:!?").lower() for p in plants for text in p.texts for word in text.split()}
    words = sorted({w.strip(".,;:!?") for p in pairs for s in sentences(p.chosen) for w in s.split()})
    fit = [w for w in words if w.isalpha() and w.islower() and 4 <= len(w) <= 9 and w not in taken]
    rng = random.Random(f"{seed}/decoys")
    return [
        Plant(name=f"decoy-{word}", kind="word", sign=rng.choice((1, -1)), dose=0.5, texts=(word,))
        for word in rng.sample(fit, min(n, len(fit)))
    ]


def decoys_matched(scoring: Scoring, n: int = DECOYS, progress: Progress = silent) -> dict[str, Any]:
    """The share of decoys that the reported features match, be their effect learned or not."""
    run, hits = scoring.run, []
    cues = decoys(scoring.held_out, scoring.plants, n, scoring.seed)
    for i, plant in enumerate(cues):
        made = twins(scoring.held_out, plant, DECOY_TWINS, scoring.seed)
        prepared = prepare(run.rm, run.saes, made, plant)
        turned = plant.model_copy(update={"sign": _sign(prepared)})
        if matches(run.rm, run.saes, turned, prepared, scoring.within(KS[0])):
            hits.append(plant.texts[0])
        progress(i + 1, len(cues), "decoy cues")
    return share(len(hits), len(cues)) | {"words": hits}


def _sign(prepared: Mapping[str, Any]) -> int:
    """The sign of the effect that the decoy happens to have: the harder case for the rule."""
    return 1 if np.mean([t.delta for t in next(iter(prepared.values()))]) > 0 else -1
