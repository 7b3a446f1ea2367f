"""Other ways to rank a site's features, for comparison: each gives one signed score per feature [m].

*head*: W_dec · w_r, the score head applied to the decoder (reward-lens); *difference*: mean activation in chosen minus in
rejected responses (SAFER); *integrated*: contributions of all features at once from a zero baseline with 4 nodes (the
reference study); *firing*: how often a feature fires; *random*. The last two have no sign: their scores are positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rmscope.effects.ledger import Path, baseline, parts_along
from rmscope.effects.tables import firing_table
from rmscope.io import Progress, silent
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.planted.results import Candidate
from rmscope.sae.base import Sae
from rmscope.statistics import Array

UNSIGNED = ("firing", "random")


def rankings(
    rm: RewardModel, sae: Sae, site: str, tokens: Sequence[PairTokens], seed: int, progress: Progress = silent
) -> dict[str, Array]:
    """The scores of every feature [m] by each way, over both sides of the pairs."""
    ids = [str(i) for i in range(len(tokens))]
    sums = {side: np.zeros(sae.m) for side in SIDES}
    fires, total = np.zeros(sae.m), np.zeros(sae.m)
    start = baseline(sae, "zero")
    for unit in units(len(tokens)):
        for row in firing_table(rm, {site: sae}, tokens, ids, unit)[site].iter_rows(named=True):
            sums[row["side"]][row["feature"]] += row["effect"]
            fires[row["feature"]] += 1
        for batch in rm.unit_batches(tokens, unit):
            path = Path(rm, site, batch, start.x)
            for parts in parts_along(path, [path.panel(0.0, 1.0)], sae, start):
                np.add.at(total, parts.feature.numpy(), parts.effect.double().numpy())
        progress(unit.stop, len(tokens), "other rankings")
    return {
        "head": sae.W_dec.double().numpy() @ _head_direction(rm),
        "difference": (sums["chosen"] - sums["rejected"]) / len(tokens),
        "integrated": total / np.maximum(fires, 1),
        "firing": fires / (2 * len(tokens)),
        "random": np.random.default_rng(seed).permutation(sae.m) + 1.0,
    }


def _head_direction(rm: RewardModel) -> Array:
    """w_r [d]: the gradient of the reward by the final hidden state. For a linear head it is the same everywhere."""
    hidden = torch.zeros(1, rm.d_model, dtype=rm.dtype, device=rm.device, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(rm.read_out(hidden).sum(), hidden)
    return gradient[0].double().cpu().numpy()


def best(scores: Array, k: int) -> list[int]:
    """The k features of the largest score, whatever its sign."""
    return [int(j) for j in np.argsort(-np.abs(scores), kind="stable")[:k]]


def as_candidates(scores: Array, k: int, sign: int | None = None) -> list[Candidate]:
    """The best k as candidates of the matching rule; ``sign`` is theirs where the scores have none."""
    return [Candidate(j, rank, float(sign or np.sign(scores[j])), 1.0) for rank, j in enumerate(best(scores, k), 1)]
