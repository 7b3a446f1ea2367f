"""Why a learned cue was missed, and which clean nulls were reported.

A miss has one reason, the first that holds:

1. *not learned*;
2. *sign not constant*: a reported feature matches the cue, but has its sign on fewer than nine in ten of its ablations;
3. *wrong sign*: reported features of the other sign match it;
4. *feature not reported*: features match it that are not among the reported ones;
5. *carried by the error*: at every site at least half of the cue's effect runs through the SAE's error (the ledgers of
   the twins);
6. *no feature*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rmscope.effects import ledger
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.matching import F1, MASS, f1_score, matches, threshold
from rmscope.planted.results import Candidate, Candidates, NullMatch
from rmscope.planted.twins import Twin, all_peaks, halves, largest, localises, mediation, peaks
from rmscope.ranking.confirm import BOUND
from rmscope.sae.base import Sae
from rmscope.statistics import interval

Reason = Literal[
    "not learned", "sign not constant", "wrong sign", "feature not reported", "carried by the error", "no feature"
]  # fmt: skip
DETECTORS = 16
"""Features of a site, reported or not, that are tried for a missed cue: those that detect it best alone."""
OFTEN = 0.2
"""A feature that fires in fewer of a cue's windows than this is not tried."""
ERROR = 0.5
"""The share of a cue's effect that must run through the error, at every site, to be called carried by it."""
LEDGERS = 8
"""Twins with a ledger: the share of the error needs one digit (.33 on a planted repeated sentence, .29 on sixteen twins)."""
GAP = 0.1
"""The share of the cue's effect that a twin's ledger may leave unaccounted for; half of it changes that share by .0003."""


@dataclass(frozen=True)
class Diagnosis:
    """A learned cue without a hit, and all that is needed to tell why."""

    rm: RewardModel
    saes: Mapping[str, Sae]
    plant: Plant
    prepared: Mapping[str, list[Twin]]
    tokens: Sequence[PairTokens]
    """Of the twins."""
    reported: Candidates
    """All reported features."""
    baselines: Mapping[str, ledger.Baseline]

    def reason(self) -> Reason:
        """The first reason that holds."""
        constant = {site: [replace(c, sign_consistency=1.0) for c in self._of_sign(site, 1)] for site in self.reported}
        if self._matches(constant):
            return "sign not constant"
        planted = float(self.plant.sign)
        turned = {site: [replace(c, mean_effect=planted) for c in self._of_sign(site, -1)] for site in self.reported}
        if self._matches(turned):
            return "wrong sign"
        if self._matches({site: self._detectors(site) for site in self.saes}):
            return "feature not reported"
        if all(self.error_share(site) >= ERROR for site in self.saes):
            return "carried by the error"
        return "no feature"

    def _matches(self, candidates: Candidates) -> bool:
        return matches(self.rm, self.saes, self.plant, self.prepared, candidates)

    def _of_sign(self, site: str, turn: int) -> list[Candidate]:
        """The reported features of the planted sign (``turn`` 1) or of the other one (-1)."""
        return [c for c in self.reported[site] if np.sign(c.mean_effect) == turn * self.plant.sign]

    def _detectors(self, site: str) -> list[Candidate]:
        """The features that detect the cue best on the fitting half, whatever their rank.

        Reported features keep their sign consistency; the others are granted a constant sign.
        """
        fitting, _ = halves(self.prepared[site])
        cue, without = all_peaks(fitting, self.saes[site].m)
        often = np.flatnonzero((cue > 0).mean(0) >= OFTEN)
        scores = {int(j): threshold(cue[:, j], without[:, j])[0] for j in often}
        best = sorted(scores, key=lambda j: (-scores[j], j))[:DETECTORS]
        sign = self.plant.sign
        known = {c.feature: c.sign_consistency if np.sign(c.mean_effect) == sign else 0.0 for c in self.reported[site]}
        return [Candidate(j, rank, float(sign), known.get(j, 1.0)) for rank, j in enumerate(best, 1)]

    def error_share(self, site: str) -> float:
        """The share of the cue's effect that runs through the SAE's error: Σ error / Σ Δr over the twins' ledgers."""
        tokens, start = self.tokens[:LEDGERS], self.baselines[site]
        effect = abs(float(np.mean([t.delta for t in self.prepared[site]])))
        sd = GAP * effect / (ledger.BOUND * ledger.FLOOR)  # the gap that a ledger may leave is a share of this
        ledgers = ledger.ledger_rows(self.rm, self.saes[site], site, tokens, range(len(tokens)), start, sd)
        rows = [row for _, row, _ in ledgers]
        return sum(row["error"] for row in rows) / sum(row["delta_r"] for row in rows)


def match_null(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    plant: Plant,
    prepared: Mapping[str, list[Twin]],
    reported: Candidates,
    sd: float,
) -> list[NullMatch]:
    """The reported features that match a clean null.

    A feature matches when it detects the null's cue, localises it (lexical cues), and its ablation moves the twins'
    difference in the feature's sign by more than the bound of a report (lower end of the interval). The bound stands for
    the mediated share, since a null has no effect to mediate.
    """
    out = []
    for site, candidates in reported.items():
        fitting, measuring = halves(prepared[site])
        for candidate in candidates:
            j = candidate.feature
            scale = {j: max(largest(t, s, j) for t in fitting for s in SIDES) or 1.0}
            _, theta = threshold(*peaks(fitting, [j], scale))
            f1 = f1_score(*peaks(measuring, [j], scale), theta)
            if f1 < F1 or (plant.kind in LEXICAL and localises(measuring, j) < MASS):
                continue
            both = mediation(rm, saes[site], site, measuring, [[j]])[0]
            moved = interval(np.sign(candidate.mean_effect) * (both[:, 0] - both[:, 1]), [t.prompt for t in measuring])
            assert moved.value is not None
            assert moved.low is not None
            if moved.low > BOUND * sd:
                out.append(NullMatch(site=site, feature=j, f1=f1, moved=moved.value))
    return out
