"""BatchTopK SAEs (Bussmann et al. 2024, arXiv 2412.06410).

    h = (x - b_dec) W_enc + b_enc           f = relu of the n k largest h of a batch of n tokens, 0 elsewhere
    x^ = f W_dec + b_dec                    L = E|x - x^|² + α E|e - e^|²

As TopK, but k features a token are an average: a token may take more than another. AuxK revives the dead.
Used on single tokens, the batch gives way to one threshold for all features, θ = E over batches of the
smallest f > 0 (here a running mean). That is a JumpReLU SAE, and as such it is saved, with
``metadata.trained_as``.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.sae.kernels import Sparse, batch_top_entries, exceeded
from rmscope.sae.registry import trains
from rmscope.sae.topk import TopKTraining
from rmscope.sae.training import Step

THRESHOLD_RATE = 0.05
"""Weight of a batch's smallest f in the running mean: about the last 20 batches count."""
GUESS = 0.8
"""Share of the running threshold below which no entry is looked at, unless too few are found above."""


@trains("batchtopk")
class BatchTopKTraining(TopKTraining):
    sae: JumpReluSae

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        if (k := config.firing(m, d)) > m:
            raise InputError(f"An SAE with {m} features cannot keep k = {k}; choose k up to {m}.")
        return JumpReluSae(d, m)

    def begin(self, x: Float[Tensor, "sample d"]) -> None:
        sae = self.sae
        typical = exceeded(x - sae.b_dec, sae.W_enc.data.t(), self.config.firing(sae.m, sae.d) / sae.m) + sae.b_enc
        sae.threshold.fill_(float(typical.median()))

    def step(self, x: Float[Tensor, "batch d"], dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        step = super().step(x, dead, ramp)
        step.gradients["threshold"].zero_()
        return step

    def _entries(self, xc: Float[Tensor, "batch d"]) -> tuple[Sparse, Float[Tensor, " nnz"]]:
        """The batch's entries; also moves the threshold, which no gradient does."""
        sae = self.sae
        count, guess = self.config.firing(sae.m, sae.d) * len(xc), GUESS * float(sae.threshold[0])
        token, feature, h = batch_top_entries(xc, sae.W_enc.data.t(), sae.b_enc, count, guess, self.fast(xc))
        if len(h):
            sae.threshold.lerp_(h.min().expand(sae.m), THRESHOLD_RATE)
        return Sparse(token.bincount(minlength=len(xc)), feature, sae.m), h
