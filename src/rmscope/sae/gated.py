"""Gated SAEs (Rajamanoharan et al. 2024, arXiv 2404.16014, section 3.2).

    u = (x - b_dec) W_enc          π = u + b_gate          μ = exp(r_mag) u + b_mag
    f = 1[π > 0] relu(μ)           x^ = f W_dec + b_dec
    L = E|x - x^|² + λ E Σ_j relu(π_j) |d_j| + E|x - relu(π) W_dec' - b_dec'|²

The gate decides what fires, the magnitude how much; the primed decoder is a frozen copy, so that the last
term trains the gate to be enough for a reconstruction and never the decoder. Errors are summed over
dimensions. Every term and every gradient lives where π > 0, so the whole step is sparse as soon as the gates
are.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import SPARSE_BELOW, Dense, Pattern, Sparse, has_fast_bfloat16, open_entries
from rmscope.sae.registry import family, trains
from rmscope.sae.training import Step, Training


@family
class GatedSae(Sae):
    architecture = "gated"
    biases = ("b_gate", "b_mag", "b_dec")
    b_gate: torch.nn.Parameter
    b_mag: torch.nn.Parameter
    r_mag: torch.nn.Parameter

    @classmethod
    def feature_parameters(cls) -> tuple[str, ...]:
        return ("b_gate", "b_mag", "r_mag")

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        u = self.centred(x) @ self.W_enc
        return (u * self.r_mag.exp() + self.b_mag).relu() * (u + self.b_gate > 0)


@trains("gated")
class GatedTraining(Training):
    sae: GatedSae

    def __init__(self, sae: GatedSae, config: SaeConfig) -> None:
        super().__init__(sae, config)
        self._density = 1.0

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> GatedSae:
        return GatedSae(d, m)

    def step(
        self, x: Float[Tensor, "batch d"], dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0
    ) -> Step:
        sae, grad, n = self.sae, self.gradients, len(x)
        rows, stretch, norms = sae.W_enc.data.t(), sae.r_mag.exp(), sae.W_dec.norm(dim=1)
        xc, weight = x - sae.b_dec, self.config.l1 * ramp / n

        entries = self._entries(xc)
        u = entries.products(xc, rows)
        gate, magnitude = u + entries.at(sae.b_gate), u * entries.at(stretch) + entries.at(sae.b_mag)
        opened = gate > 0
        f, a = magnitude.relu() * opened, gate.relu()
        residual = entries.combine(f, sae.W_dec) + sae.b_dec - x
        by_gate = entries.combine(a, sae.W_dec) + sae.b_dec - x
        parts = {
            "reconstruction": float(residual.square().sum()) / n,
            "sparsity": weight * float((entries.per_feature(a) * norms).sum()),
            "auxiliary": float(by_gate.square().sum()) / n,
        }

        dx = residual * (2 / n)
        dmagnitude = entries.products(dx, sae.W_dec) * (f > 0)
        dgate = (entries.products(by_gate * (2 / n), sae.W_dec) + weight * entries.at(norms)) * opened
        du = dgate + dmagnitude * entries.at(stretch)
        entries.outer(f, dx, grad["W_dec"])
        grad["W_dec"].addcmul_((weight * entries.per_feature(a) / norms)[:, None], sae.W_dec)
        entries.outer(du, xc, grad["W_enc.T"])
        grad["b_gate"], grad["b_mag"] = entries.per_feature(dgate), entries.per_feature(dmagnitude)
        grad["r_mag"] = entries.per_feature(dmagnitude * u) * stretch
        grad["b_dec"] = dx.sum(dim=0) - entries.per_feature(du) @ rows

        self._density = float(opened.sum()) / (n * sae.m)
        fires = entries.per_feature((f > 0).to(x.dtype))
        return Step(sum(parts.values()), parts, grad, residual, float(fires.sum()) / n, fires > 0)

    def _entries(self, xc: Float[Tensor, "batch d"]) -> Pattern:
        """Sparse once the last batch's gates were; a mask chosen a little wide is decided in float32."""
        if self._density >= SPARSE_BELOW:
            return Dense()
        fast = self.config.amp and xc.dtype == torch.float32 and has_fast_bfloat16(xc.device.type)
        mask = open_entries(xc, self.sae.W_enc.data.t(), self.sae.b_gate, fast)
        return Sparse.of_mask(mask) if float(mask.sum()) < SPARSE_BELOW * mask.numel() else Dense()
