"""Matching pursuit SAEs (Costa et al. 2025, arXiv 2506.03093), as SAELens saves them. They are read, not trained here.

    r = x - b_dec; repeat: j = argmax_j relu(r · d_j),  f_j += r · d_j,  r -= (r · d_j) d_j         x^ = Σ_j f_j d_j + b_dec

A token is done when a round adds no new feature, or when |r| is below the residual threshold. The encoder is the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.sae.base import Sae, register_sae


@register_sae
class MatchingPursuitSae(Sae):
    """``cfg["residual_threshold"]`` is in the units of x."""

    architecture = "matching_pursuit"
    feature_parameters = ()
    biases = ("b_dec",)

    def __init__(
        self, d: int, m: int, site: str = "", metadata: dict[str, Any] | None = None, *, residual_threshold: float
    ) -> None:
        super().__init__(d, m, site, metadata)
        self.cfg = {"residual_threshold": residual_threshold}

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        rest = self.centre(x).reshape(-1, self.d).clone()
        f = rest.new_zeros(len(rest), self.m)
        todo = torch.arange(len(rest), device=rest.device)
        while len(todo):
            value, feature = (rest[todo] @ self.W_dec.t()).relu().max(dim=1)
            grows = (f[todo, feature] == 0) & (value > 0)
            f[todo, feature] += value
            rest[todo] -= value[:, None] * self.W_dec[feature]
            todo = todo[grows & (rest[todo].norm(dim=1) >= self.cfg["residual_threshold"])]
        return f.reshape(*x.shape[:-1], self.m)

    @torch.no_grad()
    def change_units(self, s: float) -> None:
        super().change_units(s)
        self.cfg = {"residual_threshold": self.cfg["residual_threshold"] / s}
