"""JumpReLU SAEs (Rajamanoharan et al. 2024b, arXiv 2407.14435).

    h = (x - b_dec) W_enc + b_enc           f = h H(h - θ)                         (section 3)
    x^ = f W_dec + b_dec                    L = E|x - x^|² + λ E Σ_j H(h_j - θ_j)

H is the step function, θ the learned threshold of each feature. The loss is discontinuous in θ, so its gradient is a
straight-through estimate with a rectangular kernel of width ε, K = 1 where |h - θ| < ε / 2:

    ∂f/∂θ := -(θ / ε) K                     ∂H(h - θ)/∂θ := -(1 / ε) K             (equations 11 and 12)

The jump contributes nothing to the gradient of h: ∂f/∂h = H(h - θ), ∂H/∂h = 0. The kernel applies to the pre-activations h.
All terms vanish unless h > θ - ε / 2, so the step is sparse. θ is kept >= 0.

Four things differ from the paper, which trains on 8 10⁹ tokens from θ = ε = .001 sqrt(d) in our units. (1) Thresholds start
where each feature fires on a given share of tokens (``START_OPEN``): a few thousand Adam steps from 0 would not get there.
(2) θ is learned, not its logarithm. (3) The kernel is wider (d 576, m 2,304, 300,000 tokens: FVU .1122 at L0 23.5 with the
paper's .024, .1112 at 24.2 with .5; on a small planted dictionary .0986 at 2.7, against .0494 at 3.1). (4) Dead features get
the pre-activation loss of Anthropic's January 2025 update, λ_P E Σ relu(θ - h) |d_j|; the paper does not revive them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.sae.base import Sae, register_sae, register_training
from rmscope.sae.kernels import Batch, open_pattern, upper_quantiles
from rmscope.sae.training import START_OPEN, Step, Training


@register_sae
class JumpReluSae(Sae):
    """Trained BatchTopK and Matryoshka SAEs are of this kind too, with one threshold for all features."""

    architecture = "jumprelu"
    feature_parameters = ("b_enc", "threshold")
    biases = ("b_enc", "b_dec", "threshold")
    b_enc: torch.nn.Parameter
    threshold: torch.nn.Parameter

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        h = self.centre(x) @ self.W_enc + self.b_enc
        return h.relu() * (h > self.threshold)


@register_training("jumprelu")
class JumpReluTraining(Training):
    family = JumpReluSae
    sae: JumpReluSae

    def begin(self, x: Float[Tensor, "sample d"]) -> None:
        sae = self.sae
        sae.threshold.copy_(upper_quantiles(x - sae.b_dec, sae.W_enc.data.t(), START_OPEN) + sae.b_enc)
        self.density = START_OPEN

    def step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        sae, grad, n, width = self.sae, self.gradients, len(x), self.config.bandwidth
        rows, xc, weight = sae.W_enc.data.t(), x - sae.b_dec, self.config.l0 * ramp / n
        sae.threshold.clamp_(min=0)

        near = sae.b_enc - sae.threshold + width / 2
        entries, h = open_pattern(xc, rows, near, self.density, self.fast(xc))
        h, threshold = h + entries.at(sae.b_enc), entries.at(sae.threshold)
        over, kernel = h > threshold, (h - threshold).abs() < width / 2
        f = h * over
        residual = self.total(entries.combine(f, sae.W_dec)) + sae.b_dec - x
        fires = entries.per_feature(over.to(x.dtype))
        l0 = float(self.total(fires.sum())) / n
        parts = {"reconstruction": float(residual.square().sum()) / n, "sparsity": self.config.l0 * ramp * l0}

        dx = residual * (2 / n)
        df = entries.products(dx, sae.W_dec)
        dh = df * over
        entries.outer(f, dx, grad["W_dec"])
        entries.outer(dh, xc, grad["W_enc.T"])
        grad["b_enc"] = entries.per_feature(dh)
        grad["threshold"] = entries.per_feature(kernel * (threshold * df + weight)) / -width
        parts |= self._preact(xc, dead)
        grad["b_dec"] = dx.sum(dim=0) - self.total(grad["b_enc"] @ rows)

        self.density = float((h > threshold - width / 2).sum()) / (n * sae.m)
        return Step(sum(parts.values()), parts, grad, residual, l0, fires > 0)

    def finish(self) -> None:
        self.sae.threshold.clamp_(min=0)

    def _preact(self, xc: Batch, dead: Bool[Tensor, " m"] | None) -> dict[str, float]:
        """Adds the gradients of the pre-activation loss of dead features. Returns that loss by name, if there is one."""
        if dead is None or not self.config.preact_alpha or not int(self.total(dead.sum())):
            return {}
        sae, grad, which = self.sae, self.gradients, dead.nonzero().squeeze(1)
        norms = sae.W_dec[which].norm(dim=1)
        short = sae.threshold[which] - (xc @ sae.W_enc.data.t()[which].t() + sae.b_enc[which])
        weight = norms * (self.config.preact_alpha / len(xc))
        dh = (short > 0) * -weight
        grad["W_enc.T"].index_add_(0, which, dh.t() @ xc)
        grad["b_enc"].index_add_(0, which, dh.sum(dim=0))
        grad["threshold"].index_add_(0, which, -dh.sum(dim=0))
        loss = short.relu().sum(dim=0) * weight
        grad["W_dec"].index_add_(0, which, (loss / norms.square())[:, None] * sae.W_dec[which])
        return {"preact": float(self.total(loss.sum()))}
