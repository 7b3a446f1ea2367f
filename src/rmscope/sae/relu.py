"""Families without a step of their own here: opened and used, not trained.

``standard``: f = relu(h) (Bricken et al. 2023). ``jumprelu``: f = h where h > threshold, relu'd
(Rajamanoharan et al. 2024, arXiv 2407.14435, equation 5); BatchTopK SAEs at inference are of this kind. h =
(x - b_dec) W_enc + b_enc.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.sae.base import Sae
from rmscope.sae.registry import family


@family
class StandardSae(Sae):
    architecture = "standard"
    biases = ("b_enc", "b_dec")
    b_enc: torch.nn.Parameter

    @classmethod
    def feature_parameters(cls) -> tuple[str, ...]:
        return ("b_enc",)

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        return (self.centred(x) @ self.W_enc + self.b_enc).relu()


@family
class JumpReluSae(Sae):
    architecture = "jumprelu"
    biases = ("b_enc", "b_dec", "threshold")
    b_enc: torch.nn.Parameter
    threshold: torch.nn.Parameter

    @classmethod
    def feature_parameters(cls) -> tuple[str, ...]:
        return ("b_enc", "threshold")

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        h = self.centred(x) @ self.W_enc + self.b_enc
        return h.relu() * (h > self.threshold)
