"""What a family must say to be trained: how it starts, and its loss and gradients on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.hardware import has_fast_bfloat16
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig

START_OPEN = 1 / 32
"""Share of tokens on which a feature with a gate or threshold of its own fires at the start.

Anthropic's January 2025 update starts b_enc so, by constants set on a sample.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch: the loss, its parts, the gradient of every parameter, and what fired.

    ``gradients`` has the keys of :func:`storage`.
    """

    loss: float
    parts: dict[str, float]
    gradients: dict[str, Tensor]
    residual: Float[Tensor, "batch d"]
    l0: float
    fired: Bool[Tensor, " m"]


class Training(ABC):
    """The training side of a family, apart from the SAE itself, which stays free of it."""

    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are held to norm 1, their gradients to what is orthogonal to them."""
    clip: ClassVar[float | None] = None
    """Largest norm of all gradients together."""
    density: float = 1.0
    """Share of the entries that were open in the last batch: whether the next is done sparsely."""

    def __init__(self, sae: Any, config: SaeConfig) -> None:
        self.sae, self.config = sae, config
        self.gradients = {name: torch.zeros_like(p) for name, p in storage(sae).items()}

    @classmethod
    @abstractmethod
    def start(cls, d: int, m: int, config: SaeConfig) -> Sae:
        """A fresh SAE with the family's settings, weights not yet drawn."""

    def begin(self, x: Float[Tensor, "sample d"]) -> None:  # noqa: B027
        """Before the first step, the weights drawn: sets what starts from data, in the units of training."""

    @abstractmethod
    def step(self, x: Float[Tensor, "batch d"], dead: Bool[Tensor, " m"] | None = None, ramp: float = 1.0) -> Step:
        """Loss and gradients on a batch in the units of training; ``ramp`` warms the sparsity penalty up."""

    def revive(
        self,
        x: Float[Tensor, "batch d"],
        residual: Float[Tensor, "batch d"],
        dead: Bool[Tensor, " m"],
        generator: torch.Generator,
    ) -> bool:
        """Draws dead features anew after a step; False where a family has another way, or none."""
        return False

    def finish(self) -> None:  # noqa: B027
        """After the last step: leaves the SAE with a decoder of unit rows."""

    def fast(self, x: Tensor) -> bool:
        """Whether what fires is chosen in bfloat16."""
        return self.config.amp and x.dtype == torch.float32 and has_fast_bfloat16(x.device.type)


def storage(sae: Sae) -> dict[str, Tensor]:
    """The parameters as they lie in memory, all contiguous: W_enc as its transpose, ``W_enc.T``."""
    parameters = {name: p.data for name, p in sae.named_parameters()}
    return {"W_enc.T": parameters.pop("W_enc").t(), **parameters}


@torch.no_grad()
def draw(sae: Sae, b_dec: Float[Tensor, " d"], generator: torch.Generator) -> None:
    """Decoder rows uniform on the unit sphere, W_enc = W_dec^T (Gao et al. 2024, appendix A.1)."""
    rows = torch.randn(sae.m, sae.d, generator=generator)
    sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.W_enc.t().copy_(sae.W_dec)
    sae.b_dec.copy_(b_dec)


def geometric_median(x: Float[Tensor, "n d"], rounds: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the least summed distance to the rows (Weiszfeld's algorithm)."""
    point = x.mean(dim=0)
    for _ in range(rounds):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight[:, None] * x).sum(dim=0) / weight.sum()
        shift, point = (moved - point).norm(), moved
        if shift <= tolerance * point.norm():
            break
    return point
