"""ReLU SAEs with an L1 penalty weighted by decoder norms (Anthropic, Circuits Updates, April 2024).

    f = relu((x - b_dec) W_enc + b_enc)     x^ = f W_dec + b_dec
    L = E|x - x^|² + λ E Σ_j f_j |d_j|

The decoder's norms are free. The penalty is on f_j |d_j|, so small features with long directions gain nothing. At the end
the norms are moved into the encoder and the directions become unit, as in the update. Also from the update: W_dec and
W_enc = W_dec^T start with norm .1, gradients are clipped to norm 1, the penalty warms up, and nothing is revived. Unlike in
the update, b_dec is subtracted from the input and starts at the geometric median (Bricken et al. 2023).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.sae.base import Sae, register_sae, register_training
from rmscope.sae.kernels import Batch, open_pattern
from rmscope.sae.training import Step, Training

START_NORM = 0.1
"""Norm of the initial decoder rows. The update gives .05 to 1, and mostly uses this value."""


@register_sae
class StandardSae(Sae):
    architecture = "standard"
    feature_parameters = ("b_enc",)
    biases = ("b_enc", "b_dec")
    b_enc: torch.nn.Parameter

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        return (self.centre(x) @ self.W_enc + self.b_enc).relu()


@register_training("standard")
class StandardTraining(Training):
    unit_decoder = False
    clip = 1.0
    family = StandardSae
    sae: StandardSae

    def begin(self, x: Float[Tensor, "sample d"]) -> None:
        self.sae.W_dec.mul_(START_NORM)
        self.sae.W_enc.mul_(START_NORM)
        self.density = 0.5

    def step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        sae, grad, n = self.sae, self.gradients, len(x)
        rows, norms = sae.W_enc.data.t(), sae.W_dec.norm(dim=1)
        xc, weight = x - sae.b_dec, self.config.l1 * ramp / n

        entries, h = open_pattern(xc, rows, sae.b_enc, self.density, self.fast(xc))
        f = (h + entries.at(sae.b_enc)).relu()
        residual = self.total(entries.combine(f, sae.W_dec)) + sae.b_dec - x
        sums = entries.per_feature(f)
        penalty = weight * float(self.total((sums * norms).sum()))
        parts = {"reconstruction": float(residual.square().sum()) / n, "sparsity": penalty}

        dx = residual * (2 / n)
        dh = (entries.products(dx, sae.W_dec) + weight * entries.at(norms)) * (f > 0)
        entries.outer(f, dx, grad["W_dec"])
        grad["W_dec"].addcmul_((weight * sums / norms)[:, None], sae.W_dec)
        entries.outer(dh, xc, grad["W_enc.T"])
        grad["b_enc"] = entries.per_feature(dh)
        grad["b_dec"] = dx.sum(dim=0) - self.total(grad["b_enc"] @ rows)

        fires = entries.per_feature((f > 0).to(x.dtype))
        self.density = float(fires.sum()) / (n * sae.m)
        return Step(sum(parts.values()), parts, grad, residual, float(self.total(fires.sum())) / n, fires > 0)

    def finish(self) -> None:
        sae = self.sae
        norms = sae.W_dec.norm(dim=1)
        sae.W_dec.div_(norms[:, None])
        sae.W_enc.mul_(norms)
        sae.b_enc.mul_(norms)
