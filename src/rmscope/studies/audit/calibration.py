"""What an audit should not find: much in PMs that learned nothing, or cues that were never planted.

Two PMs of the same base, pipeline and settings: one trained on the same pairs with labels drawn by coin, one of random
weights. And the matching rule on decoy cues in the audited PM: single words that no plant uses.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from rmscope.io import Progress, silent
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences, twins
from rmscope.pairs.plants import Plant
from rmscope.planted.matching import matches
from rmscope.planted.results import KS
from rmscope.planted.twins import Twin, prepare
from rmscope.run.run import Run
from rmscope.statistics import share
from rmscope.studies.audit.result import DecoyShare, ReportedShare
from rmscope.studies.audit.scoring import Scoring

DECOYS = 100
DECOY_TWINS = 16
"""Twins that a decoy is measured on: a hundred decoys then cost as much as a few plants."""
MARKS = ".,;:!?"


def reported_share(run: Run) -> ReportedShare:
    """The share of a finished run's frozen features that it reports."""
    sites = run.evidence.sites
    counted = share(sum(s.reported for s in sites), sum(s.frozen for s in sites))
    return ReportedShare(**counted.as_dict(), sd_delta=run.sd)


def decoys(pairs: Sequence[Pair], plants: Sequence[Plant], n: int, seed: int) -> list[Plant]:
    """``n`` words of the pairs' own text that no plant uses, each as a cue of random sign."""
    taken = {word.strip(MARKS).lower() for p in plants for text in p.texts for word in text.split()}
    words = sorted({w.strip(MARKS) for p in pairs for s in sentences(p.chosen) for w in s.split()})
    fit = [w for w in words if w.isalpha() and w.islower() and 4 <= len(w) <= 9 and w not in taken]
    rng = random.Random(f"{seed}/decoys")
    return [
        Plant(name=f"decoy-{word}", kind="word", sign=rng.choice((1, -1)), dose=0.5, texts=(word,))
        for word in rng.sample(fit, min(n, len(fit)))
    ]


def match_decoys(scoring: Scoring, n: int = DECOYS, progress: Progress = silent) -> DecoyShare:
    """The share of decoys that the reported features match, whether or not the PM learned them."""
    run, words = scoring.run, list[str]()
    cues = decoys(scoring.held_out, scoring.plants, n, scoring.seed)
    for i, plant in enumerate(cues):
        pairs = twins(scoring.held_out, plant, DECOY_TWINS, scoring.seed)
        prepared = prepare(run.rm, run.saes, pairs, plant)
        turned = plant.model_copy(update={"sign": _sign(prepared)})
        if matches(run.rm, run.saes, turned, prepared, scoring.best(KS[0])):
            words.append(plant.texts[0])
        progress(i + 1, len(cues), "decoy cues")
    return DecoyShare(**share(len(words), len(cues)).as_dict(), words=tuple(words))


def _sign(prepared: Mapping[str, Sequence[Twin]]) -> int:
    """The sign of the effect that the decoy happens to have, which makes a match likelier."""
    return 1 if np.mean([t.delta for t in next(iter(prepared.values()))]) > 0 else -1
