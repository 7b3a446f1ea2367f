"""The quality of an SAE on activations, accumulated batch by batch in float64.

FVU is centred per dimension and summed over dimensions: Σ|x - x^|² / Σ|x - mean x|². With one global variance, outlier
dimensions would make it look better than it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.base import Sae


@dataclass(frozen=True, slots=True)
class Metrics:
    """The quality of an SAE on some tokens."""

    tokens: int
    l0: float
    """Features that fire per token."""
    fvu: float
    cosine: float
    """Of x and x^, mean over tokens."""
    norm_ratio: float
    """E|x^| / E|x|."""
    dead: float
    """Share of the features that never fired."""
    density: Float[Tensor, " m"]
    """Share of the tokens on which each feature fires."""


@torch.no_grad()
def measure_sae(sae: Sae, batches: Iterable[Float[Tensor, "tokens d"]]) -> Metrics:
    """All metrics over some batches.

    Raises InputError where there are no tokens, or the stream has another width than the SAE's.
    """
    sums, fires = torch.zeros(5, dtype=torch.float64), torch.zeros(sae.m, dtype=torch.int64)
    shift, total, total_squared = None, torch.zeros(sae.d).double(), torch.zeros(sae.d).double()
    for batch in batches:
        if batch.shape[1] != sae.d:
            raise InputError(f"This SAE reads a stream of width {sae.d}, the activations have {batch.shape[1]}.")
        active = sae.active(batch)
        x, x_hat = batch.double(), sae.decode_active(active).double()
        shift = x.mean(dim=0) if shift is None else shift  # sums around a typical point lose no digits
        fires += torch.bincount(active.feature, minlength=sae.m).cpu()
        total += (x - shift).sum(dim=0).cpu()
        total_squared += (x - shift).square().sum(dim=0).cpu()
        cosines = torch.cosine_similarity(x, x_hat, dim=1)
        parts = ((x - x_hat).square(), cosines, x.norm(dim=1), x_hat.norm(dim=1))
        sums += torch.tensor([len(x), *(float(part.sum()) for part in parts)], dtype=torch.float64)
    n, squared, cosine, norm, norm_hat = sums.tolist()
    if n == 0:
        raise InputError("There are no activations to measure the SAE on.")
    variance = float((total_squared - total.square() / n).sum())
    return Metrics(
        tokens=int(n),
        l0=float(fires.sum()) / n,
        fvu=squared / variance,
        cosine=cosine / n,
        norm_ratio=norm_hat / norm,
        dead=float((fires == 0).double().mean()),
        density=fires.float() / n,
    )
