"""TopK SAEs with AuxK (Gao et al. 2024, arXiv 2406.04093).

    h = (x - b_dec) W_enc + b_enc          f = relu of the k largest h of a token, 0 elsewhere
    x^ = f W_dec + b_dec                   L = E|x - x^|² + α E|e - e^|²    (sections 2.3, A.2)

e = x - x^ is held fixed, and e^ = z W_dec where z is the same activation with the k_aux largest h among the
dead features: what the living leave over, the dead learn. Both errors are summed over dimensions, averaged
over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import SPARSE_BELOW, Dense, Pattern, Sparse, has_fast_bfloat16, top_entries, top_k
from rmscope.sae.registry import family, trains
from rmscope.sae.training import Step, Training


@family
class TopKSae(Sae):
    """``cfg["k"]`` features a token, fewer where h <= 0."""

    architecture = "topk"
    biases = ("b_enc", "b_dec")
    b_enc: torch.nn.Parameter

    def __init__(
        self, d: int, m: int, site: str = "", metadata: dict[str, Any] | None = None, *, k: int
    ) -> None:
        if not 0 < k <= m:
            raise InputError(f"A TopK SAE with {m} features cannot keep k = {k}; choose k between 1 and {m}.")
        super().__init__(d, m, site, metadata)
        self.cfg = {"k": k}

    @classmethod
    def feature_parameters(cls) -> tuple[str, ...]:
        return ("b_enc",)

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        h = self.centred(x) @ self.W_enc + self.b_enc
        values, features = h.topk(self.cfg["k"], dim=-1)
        return torch.zeros_like(h).scatter(-1, features, values.relu())

    def _active(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        h = self.centred(x) @ self.W_enc + self.b_enc
        features = h.topk(self.cfg["k"], dim=-1).indices.sort(dim=-1).values
        values = h.gather(1, features)
        token, column = (values > 0).nonzero(as_tuple=True)
        return token, features[token, column], values[token, column]


@trains("topk")
class TopKTraining(Training):
    sae: TopKSae

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> TopKSae:
        return TopKSae(d, m, k=config.k)

    def step(
        self, x: Float[Tensor, "batch d"], dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0
    ) -> Step:
        sae, grad, n = self.sae, self.gradients, len(x)
        fast = self.config.amp and x.dtype == torch.float32 and has_fast_bfloat16(x.device.type)
        rows = sae.W_enc.data.t()
        xc = x - sae.b_dec

        h, features = top_entries(xc, rows, sae.b_enc, sae.cfg["k"], fast)
        entries, h = Sparse.of_top(features, sae.m), h.reshape(-1)
        f = h.relu()
        residual = entries.combine(f, sae.W_dec) + sae.b_dec - x
        loss = float(residual.square().sum()) / n

        dx = residual * (2 / n)
        dh = entries.products(dx, sae.W_dec) * (h > 0)
        entries.outer(f, dx, grad["W_dec"])
        entries.outer(dh, xc, grad["W_enc.T"])
        grad["b_enc"] = entries.per_feature(dh)
        parts = {"reconstruction": loss}
        if dead is not None and self.config.auxk_alpha and bool(dead.any()):
            parts["auxk"] = self._auxk(xc, -residual, dead.nonzero().squeeze(1))
        grad["b_dec"] = dx.sum(dim=0) - grad["b_enc"] @ rows

        fired = torch.zeros(sae.m, dtype=torch.bool, device=x.device)
        fired[entries.feature[h > 0]] = True
        return Step(sum(parts.values()), parts, grad, residual, float((h > 0).sum()) / n, fired)

    def _auxk(
        self, xc: Float[Tensor, "batch d"], error: Float[Tensor, "batch d"], dead: Int[Tensor, " n_dead"]
    ) -> float:
        """Adds the gradients of α E|e - e^|² and returns that loss."""
        sae, grad, n = self.sae, self.gradients, len(xc)
        rows, decoder = sae.W_enc.data.t()[dead], sae.W_dec[dead]
        k = min(self.config.auxk or max(1, sae.d // 2), len(dead))
        h = xc @ rows.t() + sae.b_enc[dead]
        entries: Pattern
        if k < SPARSE_BELOW * len(dead):
            h, features = top_k(h, k)
            entries, h = Sparse.of_top(features, len(dead)), h.reshape(-1)
        else:
            chosen = torch.zeros_like(h, dtype=torch.bool).scatter_(1, h.topk(k, dim=1).indices, True)
            entries, h = Dense(), h * chosen
        z = h.relu()
        difference = entries.combine(z, decoder) - error

        dx = difference * (2 * self.config.auxk_alpha / n)
        dh = entries.products(dx, decoder) * (h > 0)
        for name, codes, a in (("W_dec", z, dx), ("W_enc.T", dh, xc)):
            part = torch.empty_like(decoder)
            entries.outer(codes, a, part)
            grad[name].index_add_(0, dead, part)
        grad["b_enc"].index_add_(0, dead, entries.per_feature(dh))
        return self.config.auxk_alpha * float(difference.square().sum()) / n
