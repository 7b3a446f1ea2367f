"""TopK SAEs with AuxK (Gao et al. 2024, arXiv 2406.04093).

    h = (x - b_dec) W_enc + b_enc          f = relu of the k largest h of a token, 0 elsewhere
    x^ = f W_dec + b_dec                   L = E|x - x^|² + α E|e - e^|²    (sections 2.3, A.2)

The second term is AuxK: dead features learn the error e = x - x^ of the others, which is held fixed. e^ = z W_dec, with z
the relu of the k_aux largest pre-activations of a token among the dead features. Both errors are summed over dimensions and
averaged over tokens. BatchTopK and Matryoshka SAEs use the same AuxK.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae, register_sae, register_training
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import SPARSE_BELOW, Batch, Dense, Pattern, Sparse, largest, top_entries, top_k
from rmscope.sae.training import Step, Training


@register_sae
class TopKSae(Sae):
    """``cfg["k"]`` features per token, fewer where h <= 0."""

    architecture = "topk"
    feature_parameters = ("b_enc",)
    biases = ("b_enc", "b_dec")
    b_enc: torch.nn.Parameter

    def __init__(self, d: int, m: int, site: str = "", metadata: dict[str, Any] | None = None, *, k: int) -> None:
        if not 0 < k <= m:
            raise InputError(f"A TopK SAE with {m} features cannot keep k = {k}; choose k between 1 and {m}.")
        super().__init__(d, m, site, metadata)
        self.cfg = {"k": k}

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        h = self.centre(x) @ self.W_enc + self.b_enc
        values, features = h.topk(self.cfg["k"], dim=-1)
        return torch.zeros_like(h).scatter(-1, features, values.relu())

    def _active(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        h = self.centre(x) @ self.W_enc + self.b_enc
        features = h.topk(self.cfg["k"], dim=-1).indices.sort(dim=-1).values
        values = h.gather(1, features)
        token, column = (values > 0).nonzero(as_tuple=True)
        return token, features[token, column], values[token, column]


@register_training("topk")
class TopKTraining(Training):
    """BatchTopK shares this step and chooses its entries differently."""

    sae: Any

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        return TopKSae(d, m, k=config.k_for(m, d))

    def step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        sae, grad, n = self.sae, self.gradients, len(x)
        rows, xc = sae.W_enc.data.t(), x - sae.b_dec

        entries, h = self._entries(xc)
        f = h.relu()
        residual = self.total(entries.combine(f, sae.W_dec)) + sae.b_dec - x
        loss = float(residual.square().sum()) / n

        dx = residual * (2 / n)
        dh = entries.products(dx, sae.W_dec) * (h > 0)
        entries.outer(f, dx, grad["W_dec"])
        entries.outer(dh, xc, grad["W_enc.T"])
        grad["b_enc"] = entries.per_feature(dh)
        parts = {"reconstruction": loss, **self.auxk(xc, -residual, dead)}
        grad["b_dec"] = dx.sum(dim=0) - self.total(grad["b_enc"] @ rows)

        fired = torch.bincount(entries.feature[h > 0], minlength=sae.m) > 0
        return Step(sum(parts.values()), parts, grad, residual, float(self.total((h > 0).sum())) / n, fired)

    def _entries(self, xc: Batch) -> tuple[Sparse, Float[Tensor, " nnz"]]:
        """The active entries of a batch, and their pre-activations."""
        sae = self.sae
        k = sae.cfg["k"]
        h, features = top_entries(xc, sae.W_enc.data.t(), sae.b_enc, min(k, sae.m), self.fast(xc))
        return self._largest_entries(h, features, k, sae.m)

    def _largest_entries(
        self, h: Float[Tensor, "n some"], features: Int[Tensor, "n some"], k: int, m: int
    ) -> tuple[Sparse, Float[Tensor, " nnz"]]:
        """Those of this rank's largest entries per token that are among the k largest of all ranks."""
        if self.shares.features.count == 1:
            return Sparse.of_top(features, m), h.reshape(-1)
        own = self._among_largest(h, k)
        return Sparse(own.sum(dim=1), features[own], m), h[own]

    def _among_largest(self, h: Float[Tensor, "n some"], k: int) -> Bool[Tensor, "n some"]:
        return largest(h.t(), k, self.shares.features).t()

    def auxk(self, xc: Batch, error: Batch, dead: Bool[Tensor, " m"] | None) -> dict[str, float]:
        """Adds the gradients of AuxK to those of W_dec, W_enc and b_enc. Returns its loss by name, if there is one.

        ``xc`` is x - b_dec. The caller adds the gradient of b_dec, which follows from that of b_enc.
        """
        if dead is None or not self.config.auxk_alpha or not (n_dead := int(self.total(dead.sum()))):
            return {}
        sae, grad, which, n = self.sae, self.gradients, dead.nonzero().squeeze(1), len(xc)
        rows, decoder = sae.W_enc.data.t()[which], sae.W_dec[which]
        k = min(self.config.auxk or max(1, sae.d // 2), n_dead)
        h = xc @ rows.t() + sae.b_enc[which]
        values, features = top_k(h, min(k, len(which)))
        entries: Pattern
        if k < SPARSE_BELOW * len(which):
            entries, h = self._largest_entries(values, features, k, len(which))
        else:
            own = self._among_largest(values, k)
            entries, h = Dense(), h * torch.zeros_like(h, dtype=torch.bool).scatter_(1, features, own)
        z = h.relu()
        difference = self.total(entries.combine(z, decoder)) - error
        dx = difference * (2 * self.config.auxk_alpha / n)
        dh = entries.products(dx, decoder) * (h > 0)
        for name, codes, a in (("W_dec", z, dx), ("W_enc.T", dh, xc)):
            part = torch.empty_like(decoder)
            entries.outer(codes, a, part)
            grad[name].index_add_(0, which, part)
        grad["b_enc"].index_add_(0, which, entries.per_feature(dh))
        return {"auxk": self.config.auxk_alpha * float(difference.square().sum()) / n}
