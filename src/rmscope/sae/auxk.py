"""AuxK (Gao et al. 2024, arXiv 2406.04093, section A.2): dead features learn the error of the others.

    L_aux = α E|e - e^|²          e^ = z W_dec

e = x - x^ is held fixed. z is relu of the k_aux largest pre-activations of a token among the dead features. BatchTopK and
Matryoshka SAEs use the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import SPARSE_BELOW, Dense, Pattern, Sparse, top_k


def auxk(
    sae: Any,
    gradients: dict[str, Tensor],
    config: SaeConfig,
    xc: Float[Tensor, "batch d"],
    error: Float[Tensor, "batch d"],
    dead: Bool[Tensor, " m"] | None,
) -> dict[str, float]:
    """Adds the gradients of L_aux to those of W_dec, W_enc and b_enc. Returns the loss by name, if there is one.

    ``xc`` is x - b_dec. The caller adds its gradient, which follows from that of b_enc.
    """
    if dead is None or not config.auxk_alpha or not bool(dead.any()):
        return {}
    which, n = dead.nonzero().squeeze(1), len(xc)
    rows, decoder = sae.W_enc.data.t()[which], sae.W_dec[which]
    k = min(config.auxk or max(1, sae.d // 2), len(which))
    h = xc @ rows.t() + sae.b_enc[which]
    entries: Pattern
    if k < SPARSE_BELOW * len(which):
        h, features = top_k(h, k)
        entries, h = Sparse.of_top(features, len(which)), h.reshape(-1)
    else:
        chosen = torch.zeros_like(h, dtype=torch.bool).scatter_(1, h.topk(k, dim=1).indices, True)
        entries, h = Dense(), h * chosen
    z = h.relu()
    difference = entries.combine(z, decoder) - error

    dx = difference * (2 * config.auxk_alpha / n)
    dh = entries.products(dx, decoder) * (h > 0)
    for name, codes, a in (("W_dec", z, dx), ("W_enc.T", dh, xc)):
        part = torch.empty_like(decoder)
        entries.outer(codes, a, part)
        gradients[name].index_add_(0, which, part)
    gradients["b_enc"].index_add_(0, which, entries.per_feature(dh))
    return {"auxk": config.auxk_alpha * float(difference.square().sum()) / n}
