"""Rewards of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens


def check_reward(reward: float, of: str) -> float:
    """The reward of the text ``of``. InputError where it is not finite: one such number spoils every mean."""
    if not isfinite(reward):
        raise InputError(
            f"The reward of {of} is {reward}, no finite number; load the PM in float32, or leave that pair out."
        )
    return reward


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of both sides, [pairs] float32."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]

    @property
    def delta(self) -> Float[Tensor, " pairs"]:
        """Δr = r(chosen) - r(rejected)."""
        return self.chosen - self.rejected


def scores_of(tokens: Sequence[PairTokens], chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Scores:
    """The scores of pairs. Sides that are the same tokens are a tie, which no rounding decides."""
    ties = torch.tensor([torch.equal(t.chosen, t.rejected) for t in tokens], dtype=torch.bool)
    return Scores(chosen, torch.where(ties, chosen, rejected))
