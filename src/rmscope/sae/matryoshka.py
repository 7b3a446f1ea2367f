"""Matryoshka BatchTopK SAEs (Bussmann et al. 2025, arXiv 2503.17547).

    f as in BatchTopK, over all m features          x^_i = Σ_{j < m_i} f_j d_j + b_dec
    L = Σ_i E|x - x^_i|² + α E|e - e^|²

The nested dictionaries of sizes m_1 < m_2 < ... = m share their features. Each prefix must reconstruct by itself, so the
first features stay general and later ones refine them. AuxK uses the error of the whole dictionary. Saved as ``jumprelu``.

A feature of group g (m_{g-1} <= j < m_g) is part of x^_g, x^_{g+1}, ..., so its gradient is that of the sum of their errors.
The step therefore runs on one pattern whose rows are (group, token). Combined, it gives each group's share of the
reconstruction. Cumulative sums over the groups nest the reconstructions; reversed, they nest the gradients.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae, register_training
from rmscope.sae.batchtopk import BatchTopKTraining
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import Batch, Sparse
from rmscope.sae.training import Step

PAPER_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""The paper's prefixes: 2048, 6144, 14336 and 30720 of 65536 features, then all."""


def prefix_sizes(config: SaeConfig, m: int) -> tuple[int, ...]:
    """The sizes m_1 < m_2 < ... = m of the nested dictionaries. Raises InputError where the given ones do not rise."""
    if config.prefixes is None:
        return tuple(sorted({max(1, round(share * m)) for share in PAPER_SHARES} | {m}))
    sizes = config.prefixes if config.prefixes[-1] == m else (*config.prefixes, m)
    if sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
        told = ", ".join(map(str, config.prefixes))
        raise InputError(f"Prefixes {told} do not nest in {m} features; give rising sizes up to {m}.")
    return sizes


@register_training("matryoshka")
class MatryoshkaTraining(BatchTopKTraining):
    """BatchTopK with the loss summed over nested dictionaries."""

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        prefix_sizes(config, m)
        return super().start(d, m, config)

    def step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        sae, grad, n, d = self.sae, self.gradients, len(x), x.shape[1]
        rows, xc = sae.W_enc.data.t(), x - sae.b_dec

        flat, h = self._entries(xc)
        sizes = torch.tensor(prefix_sizes(self.config, self.m), device=x.device)
        group = torch.bucketize(flat.feature + self.first, sizes, right=True)
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group * n + flat.token, minlength=len(sizes) * n)
        entries, f = Sparse(counts, flat.feature[order], sae.m), h[order]

        shares = self.total(entries.combine(f, sae.W_dec)).view(len(sizes), n, d)
        residuals = shares.cumsum(dim=0) + (sae.b_dec - x)
        dx = residuals * (2 / n)
        through = dx.flip(0).cumsum(dim=0).flip(0)
        dh = entries.products(through.view(-1, d), sae.W_dec)
        entries.outer(f, through.view(-1, d), grad["W_dec"])
        entries.outer(dh, xc.repeat(len(sizes), 1), grad["W_enc.T"])
        grad["b_enc"] = entries.per_feature(dh)
        parts = {"reconstruction": float(residuals.square().sum()) / n, **self.auxk(xc, -residuals[-1], dead)}
        grad["b_dec"] = through[0].sum(dim=0) - self.total(grad["b_enc"] @ rows)

        fired = torch.bincount(entries.feature, minlength=sae.m) > 0
        return Step(sum(parts.values()), parts, grad, residuals[-1], float(self.total((h > 0).sum())) / n, fired)
