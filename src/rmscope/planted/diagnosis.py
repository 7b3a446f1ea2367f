"""Why a learned cue was missed, and which clean nulls were reported.

A miss has one reason, the first that holds. *Sign not constant*: a reported feature matches the cue, but has its sign on
fewer than nine in ten of its ablations. *Wrong sign*: reported features of the other sign match it. *Feature not reported*:
features match it that are not among the reported ones. *Carried by the error*: at every site at least half of the cue's
effect runs through the SAE's error, by the ledgers of the twins. Else *no feature*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rmscope.effects import ledger
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.matching import F1, MASS, OFTEN, held_out_f1, matches, threshold, union
from rmscope.planted.results import Candidate, Candidates, NullMatch
from rmscope.planted.twins import Prepared, all_peaks, halves, localises, mediation, scaled_peaks
from rmscope.ranking.confirm import BOUND
from rmscope.sae.base import Sae
from rmscope.statistics import interval

DETECTORS = 16
"""Features of a site, reported or not, that are tried for a missed cue: those that detect it best alone."""
ERROR = 0.5
"""The share of a cue's effect that must run through the error, at every site, to be called carried by it."""
LEDGERS = 8
"""Twins with a ledger: the share of the error needs one digit (.33 on a planted repeated sentence, .29 on sixteen twins)."""
GAP = 0.1
"""The share of the cue's effect that a twin's ledger may leave unaccounted for; half of it changes that share by .0003."""


@dataclass(frozen=True)
class Diagnosis:
    """A learned cue without a hit; ``tokens`` are those of its twins, ``reported`` are all reported features."""

    rm: RewardModel
    saes: Mapping[str, Sae]
    plant: Plant
    prepared: Prepared
    tokens: Sequence[PairTokens]
    reported: Candidates
    baselines: Mapping[str, ledger.Baseline]

    def reason(self) -> str:
        """The first reason that holds."""
        given = (self.rm, self.saes, self.plant, self.prepared)
        if matches(*given, {s: [replace(c, sign_consistency=1.0) for c in cs] for s, cs in self.reported.items()}):
            return "sign not constant"
        if matches(*given, {s: [replace(c, mean_effect=-c.mean_effect) for c in cs] for s, cs in self.reported.items()}):
            return "wrong sign"
        if matches(*given, {site: self._detectors(site) for site in self.saes}):
            return "feature not reported"
        if all(self.error_share(site) >= ERROR for site in self.saes):
            return "carried by the error"
        return "no feature"

    def _detectors(self, site: str) -> list[Candidate]:
        """The features that detect the cue best on the fitting half; those that are not reported get a constant sign."""
        cue, without = all_peaks(halves(self.prepared[site])[0], self.saes[site].m)
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
        rows = [r for _, r, _ in ledger.ledger_rows(self.rm, self.saes[site], site, tokens, range(len(tokens)), start, sd)]
        return sum(row["error"] for row in rows) / sum(row["delta_r"] for row in rows)


def match_null(
    rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, prepared: Prepared, reported: Candidates, sd: float
) -> list[NullMatch]:
    """The reported features, or concepts, that match a clean null.

    One matches when it detects the null's cue, localises it (features and lexical cues), and its ablation moves the twins'
    difference in its sign by more than the bound of a report (lower end of the interval). The bound replaces the mediated
    share, since a null has no effect to mediate.
    """
    out = []
    measuring = {site: halves(twins)[1] for site, twins in prepared.items()}
    for site, candidates in reported.items():
        features = list(dict.fromkeys(j for c in candidates for j in c.at(site)[site]))
        fitting_peaks, peaks = scaled_peaks(prepared[site], features, saes[site].m)
        for c in candidates:
            f1 = held_out_f1(union(fitting_peaks, c.at(site)[site]), union(peaks, c.at(site)[site]))
            elsewhere = plant.kind in LEXICAL and not c.members and localises(measuring[site], c.feature) < MASS
            if f1 < F1 or elsewhere:
                continue
            both = mediation(rm, saes, measuring, [c.at(site)])[0]
            moved = interval(np.sign(c.mean_effect) * (both[:, 0] - both[:, 1]), [t.prompt for t in measuring[site]])
            if moved.value is not None and moved.low is not None and moved.low > BOUND * sd:
                found = NullMatch(site=site, feature=c.feature, concept=bool(c.members), f1=f1, moved=moved.value)
                out.append(found)
    return out
