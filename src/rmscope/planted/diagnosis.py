"""What stands beside the hits of an audit: clean nulls that were reported all the same, and why a learned cue was missed.

A miss has one reason (METHOD, "Planted bias"), the first that holds: *not learned*; *sign not constant*, where a reported
feature matches it but for the sign, which it has on fewer than nine in ten of its firings; *wrong sign*, where reported
features of the other sign match it; *feature not reported*, where features match it that are not among the reported ones;
*carried by the error*, where at every site at least half of the cue's effect runs through the SAE's error (the ledger of the
twins); else *no feature*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmscope.effects import ledger
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.plants import LEXICAL, Plant
from rmscope.planted.matching import F1, MASS, f1_score, matches, threshold
from rmscope.planted.twins import Twin, all_peaks, halves, largest, localises, mediation, peaks
from rmscope.ranking.ranking import BOUND
from rmscope.sae.base import Sae
from rmscope.statistics import bootstrap

Reason = Literal[
    "not learned", "sign not constant", "wrong sign", "feature not reported", "carried by the error", "no feature"
]  # fmt: skip
Rows = Mapping[str, list[dict[str, Any]]]
"""Per site, rows of features: feature, rank, mean_effect, sign_consistency."""
DETECTORS = 16
"""Features of a site, reported or not, that are tried for a cue that was missed: those that detect it best alone."""
OFTEN = 0.2
"""A feature that fires in fewer of a cue's windows than this is not tried."""
ERROR = 0.5
"""The share of a cue's effect that, at every site, must run through the error to be called carried by it."""
LEDGERS = 8
"""Twins whose ledgers say so: it is a share to one digit (.33 on a planted repeated sentence, .29 on sixteen)."""
GAP = 0.1
"""The share of the cue's effect that a twin's ledger may leave unaccounted for; half of it changes that share by .0003."""


@dataclass(frozen=True)
class Diagnosis:
    """A learned cue without a hit, and what is needed to say why."""

    rm: RewardModel
    saes: Mapping[str, Sae]
    plant: Plant
    prepared: Mapping[str, list[Twin]]
    tokens: Sequence[PairTokens]
    """Of the twins."""
    reported: Rows
    """All that were reported."""
    baselines: Mapping[str, ledger.Baseline]

    def reason(self) -> Reason:
        if self._matches(self._reported(self.plant.sign, sign_consistency=1.0)):
            return "sign not constant"
        if self._matches(self._reported(-self.plant.sign, mean_effect=float(self.plant.sign))):
            return "wrong sign"
        if self._matches({site: self._detectors(site) for site in self.saes}):
            return "feature not reported"
        if all(self.error_share(site) >= ERROR for site in self.saes):
            return "carried by the error"
        return "no feature"

    def _matches(self, rows: Rows) -> bool:
        return matches(self.rm, self.saes, self.plant, self.prepared, rows)

    def _reported(self, sign: int, **changes: float) -> Rows:
        """The reported features of a sign, as if ``changes`` were true of them."""
        return {
            site: [row | changes for row in rows if np.sign(row["mean_effect"]) == sign]
            for site, rows in self.reported.items()
        }

    def _detectors(self, site: str) -> list[dict[str, Any]]:
        """The features that detect the cue best on the fitting half, whatever the ranking says of them; what is reported
        keeps what is known of its sign."""
        fitting, _ = halves(self.prepared[site])
        cue, without = all_peaks(fitting, self.saes[site].m)
        often = np.flatnonzero((cue > 0).mean(0) >= OFTEN)
        scores = {int(j): threshold(cue[:, j], without[:, j])[0] for j in often}
        best = sorted(scores, key=lambda j: (-scores[j], j))[:DETECTORS]
        sign = self.plant.sign
        known = {
            row["feature"]: row["sign_consistency"] if np.sign(row["mean_effect"]) == sign else 0.0
            for row in self.reported[site]
        }
        return [
            {"feature": j, "rank": i, "mean_effect": float(sign), "sign_consistency": known.get(j, 1.0)}
            for i, j in enumerate(best, 1)
        ]

    def error_share(self, site: str) -> float:
        """How much of the cue's effect runs through the SAE's error: Σ error / Σ Δr over the twins' ledgers."""
        tokens, start = self.tokens[:LEDGERS], self.baselines[site]
        effect = abs(float(np.mean([t.delta for t in self.prepared[site]])))
        sd = GAP * effect / (ledger.BOUND * ledger.FLOOR)  # of which a ledger's gap is a share
        made = ledger.ledger_rows(self.rm, self.saes[site], site, tokens, range(len(tokens)), start, sd)
        rows = [row for _, row, _ in made]
        return sum(row["error"] for row in rows) / sum(row["delta_r"] for row in rows)


def null_reported(
    rm: RewardModel, saes: Mapping[str, Sae], plant: Plant, prepared: Mapping[str, list[Twin]], reported: Rows, sd: float
) -> list[dict[str, Any]]:
    """The reported features that match a clean null: they detect it, localise it (lexical cues), and ablating one moves the
    twins' difference by more than the bound of a report, lower end of the interval, in the feature's sign.

    With no effect to mediate there is no share of it; the bound of a report takes its place.
    """
    found = []
    for site, rows in reported.items():
        fitting, measuring = halves(prepared[site])
        for row in rows:
            j = int(row["feature"])
            scale = {j: max(largest(t, s, j) for t in fitting for s in ("chosen", "rejected")) or 1.0}  # type: ignore[arg-type]
            _, theta = threshold(*peaks(fitting, [j], scale))
            f1 = f1_score(*peaks(measuring, [j], scale), theta)
            if f1 < F1 or (plant.kind in LEXICAL and localises(measuring, j) < MASS):
                continue
            both = mediation(rm, saes[site], site, measuring, [[j]])[0]
            moved = np.sign(row["mean_effect"]) * (both[:, 0] - both[:, 1])
            low, _ = bootstrap(moved, np.array([t.prompt for t in measuring]), lambda v: float(v.mean()))
            if low > BOUND * sd:
                found.append({"site": site, "feature": j, "f1": f1, "moved": float(moved.mean())})
    return found
