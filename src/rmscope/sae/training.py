"""The interface by which a family is trained: how it starts, and its loss and gradients on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.hardware import has_fast_bfloat16
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import Batch
from rmscope.sae.shares import SLICE, WHOLE, Shares

START_OPEN = 1 / 32
"""Share of tokens on which a feature with a gate or threshold of its own fires at the start, as in Anthropic's January 2025
update, which initialises b_enc like this."""


@dataclass(frozen=True, slots=True)
class Step:
    """The loss and gradients on one batch, and which features fired."""

    loss: float
    parts: dict[str, float]
    """The terms of the loss by name."""
    gradients: dict[str, Tensor]
    """By parameter, with the keys of :func:`storage`."""
    residual: Batch
    """x^ - x of this rank's tokens."""
    l0: float
    fired: Bool[Tensor, " m"]


class Training(ABC):
    """How a family is trained. The SAE class itself contains nothing about training."""

    family: ClassVar[type[Sae]]
    """The class of the SAEs that it trains."""
    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows keep norm 1; their gradients are then projected orthogonal to them."""
    clip: ClassVar[float | None] = None
    """The largest norm of all gradients together; None for no clipping."""
    density: float = 1.0
    """Share of the entries that were open in the last batch. It decides whether the next step is sparse."""

    def __init__(self, sae: Any, config: SaeConfig, shares: Shares = WHOLE) -> None:
        """``sae`` has the features that this rank holds, ``first`` is the number of the first of them, ``m`` that of all."""
        self.sae, self.config, self.shares = sae, config, shares
        self.gradients = {name: torch.zeros_like(p) for name, p in storage(sae).items()}
        held = torch.cat(shares.features.gather(torch.tensor([sae.m]))).tolist()
        self.m, self.first = sum(held), sum(held[: shares.features.rank])

    @classmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        """A new SAE with the family's settings, before its weights are drawn."""
        return cls.family(d, m)

    def begin(self, x: Float[Tensor, "sample d"]) -> None:  # noqa: B027
        """Called before the first step, once the weights are drawn: sets what depends on data, in the units of training."""

    @abstractmethod
    def step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        """Loss and gradients on a batch in the units of training. ``ramp`` scales the sparsity penalty, for its warm-up.

        Ranks that share the features take it together: what sums over features goes through :meth:`total`.
        """

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share the features."""
        return self.shares.features.sum(x)

    def shared_step(self, x: Batch, dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        """The same on this rank's tokens of a batch. All but the residual is then that of the whole batch."""
        ranks = self.shares.tokens
        if ranks.count == 1:
            return self.step(x, dead, ramp)
        own = x.tensor_split(ranks.count)[ranks.rank]
        step, weight = self.step(own, dead, ramp), len(own) / len(x)
        for gradient in step.gradients.values():
            ranks.sum(gradient.mul_(weight))
        figures = torch.tensor([*step.parts.values(), step.l0, self.density], dtype=torch.float64) * weight
        *terms, l0, self.density = ranks.sum(figures).tolist()
        fired = ranks.sum(step.fired.int()) > 0
        parts = dict(zip(step.parts, terms, strict=True))
        return replace(step, loss=sum(terms), parts=parts, l0=l0, fired=fired)

    def revive(self, x: Batch, residual: Batch, dead: Bool[Tensor, " m"], generator: torch.Generator) -> bool:
        """Redraws dead features after a step. False for families that revive features in another way, or not at all."""
        return False

    def finish(self) -> None:  # noqa: B027
        """Called after the last step: leaves the SAE with unit decoder rows."""

    def fast(self, x: Tensor) -> bool:
        """Whether bfloat16 products decide which features fire."""
        return self.config.amp and x.dtype == torch.float32 and has_fast_bfloat16(x.device.type)


def storage(sae: Sae) -> dict[str, Tensor]:
    """The parameters as they are stored, all contiguous: W_enc as its transpose, ``W_enc.T``."""
    parameters = {name: p.data for name, p in sae.named_parameters()}
    return {"W_enc.T": parameters.pop("W_enc").t(), **parameters}


@torch.no_grad()
def draw(
    sae: Sae, b_dec: Float[Tensor, " d"], generator: torch.Generator, m: int | None = None, rows: slice = slice(None)
) -> None:
    """Decoder rows uniform on the unit sphere, W_enc = W_dec^T (Gao et al. 2024, appendix A.1).

    Where the SAE holds only some ``rows`` of ``m`` features, all are drawn, some at a time.
    """
    m = m or sae.m
    own, starts = range(m)[rows], [*range(0, m - SLICE + 1, SLICE)] or [0]
    for start, stop in pairwise([*starts, m]):
        drawn = torch.randn(stop - start, sae.d, generator=generator)
        low, high = max(start, own.start), min(stop, own.stop)
        if low < high:
            part = drawn[low - start : high - start]
            sae.W_dec[low - own.start : high - own.start] = part / part.norm(dim=1, keepdim=True)
    sae.W_enc.t().copy_(sae.W_dec)
    sae.b_dec.copy_(b_dec)


def geometric_median(x: Float[Tensor, "n d"], rounds: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to the rows (Weiszfeld's algorithm)."""
    point = x.mean(dim=0)
    for _ in range(rounds):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight[:, None] * x).sum(dim=0) / weight.sum()
        shift, point = (moved - point).norm(), moved
        if shift <= tolerance * point.norm():
            break
    return point
