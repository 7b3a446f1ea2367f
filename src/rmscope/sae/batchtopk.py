"""BatchTopK SAEs (Bussmann et al. 2024, arXiv 2412.06410).

    h = (x - b_dec) W_enc + b_enc           f = relu of the n k largest h of a batch of n tokens, 0 elsewhere
    x^ = f W_dec + b_dec                    L = E|x - x^|² + α E|e - e^|²

As TopK, but k features per token are an average: some tokens take more than others. AuxK revives dead features. For single
tokens, one threshold for all features replaces the batch: θ = E over batches of the smallest f > 0 (here a running mean).
That is a JumpReLU SAE, and it is saved as one, with ``metadata.trained_as``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae, register_training
from rmscope.sae.config import SaeConfig
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.sae.kernels import Batch, Sparse, batch_top_entries, upper_quantiles
from rmscope.sae.topk import TopKTraining

THRESHOLD_RATE = 0.05
"""Weight of a batch's smallest f in the running mean, which covers about the last 20 batches."""
GUESS = 0.8
"""Entries below this share of the running threshold are ignored, unless too few are above it."""


@register_training("batchtopk")
class BatchTopKTraining(TopKTraining):
    """Trains a JumpReLU SAE with one threshold for all features."""

    sae: JumpReluSae

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        if (k := config.k_for(m, d)) > m:
            raise InputError(f"An SAE with {m} features cannot keep k = {k}; choose k up to {m}.")
        return JumpReluSae(d, m)

    def begin(self, x: Float[Tensor, "sample d"]) -> None:
        sae = self.sae
        share = self.config.k_for(self.m, sae.d) / self.m
        typical = upper_quantiles(x - sae.b_dec, sae.W_enc.data.t(), share) + sae.b_enc
        sae.threshold.fill_(float(torch.cat(self.shares.features.gather(typical)).median()))

    def _entries(self, xc: Batch) -> tuple[Sparse, Float[Tensor, " nnz"]]:
        """As for TopK. Also updates the threshold, which has no gradient."""
        sae = self.sae
        self.gradients["threshold"].zero_()
        ranks, tokens = self.shares.together, int(self.shares.tokens.sum(torch.tensor(len(xc))))
        count, guess = self.config.k_for(self.m, sae.d) * tokens, GUESS * float(sae.threshold[0])
        token, feature, h = batch_top_entries(xc, sae.W_enc.data.t(), sae.b_enc, count, guess, self.fast(xc), ranks)
        smallest = torch.cat(ranks.gather(h.amin(dim=0, keepdim=True) if len(h) else h))
        if len(smallest):
            sae.threshold.lerp_(smallest.min().expand(sae.m), THRESHOLD_RATE)
        return Sparse(token.bincount(minlength=len(xc)), feature, sae.m), h
