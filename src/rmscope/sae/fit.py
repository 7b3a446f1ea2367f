"""Whether an SAE from elsewhere fits the stream on which it is used: its figures there, against what is stated of it.

One of another model, layer or scale reconstructs worse than the mean does, or as badly as with its decoder rows shuffled, or
fires on far more or fewer features than its config states. Everything is measured on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.sae.base import Active, Sae

ROWS = 4096
"""Tokens on which an SAE is tried."""
FAR = 3.0
"""By how much L0 may differ from what is stated, as a factor."""
WORSE = 0.25
"""By how much FVU may exceed what is stated."""
MEND = "it may be of another model, layer or scale: name one that was trained on this PM or its base, or train one"
AS_SHUFFLED = 0.9
"""An FVU above this share of that with shuffled rows is no better than chance."""


@dataclass(frozen=True, slots=True)
class Fit:
    """An SAE on some rows of a stream."""

    tokens: int
    fvu: float
    shuffled_fvu: float | None
    """The same with the decoder rows dealt to other features; None where it was not measured."""
    l0: float
    dead: float
    """Share of the features that stay silent on these tokens."""
    stated_fvu: float | None
    stated_l0: float | None

    def doubts(self) -> list[str]:
        """What speaks for another model, layer or scale, in words."""
        found = []
        if not self.fvu < 1:
            found.append("it reconstructs worse than the mean of the stream does")
        elif self.shuffled_fvu is not None and self.fvu > AS_SHUFFLED * self.shuffled_fvu:
            found.append("its directions are no better than shuffled ones")
        elif self.stated_fvu is not None and self.fvu > self.stated_fvu + WORSE:
            found.append("it reconstructs worse than is stated of it")
        if self.l0 == 0:
            found.append("none of its features fires")
        elif self.stated_l0 and not 1 / FAR <= self.l0 / self.stated_l0 <= FAR:
            found.append(
                "far fewer of its features fire than stated" if self.l0 < self.stated_l0 else "far more fire than stated"
            )
        return found

    def figures(self) -> str:
        """The figures in words."""
        of_fvu = _aside({"with shuffled decoder rows": self.shuffled_fvu, "stated:": self.stated_fvu})
        of_l0 = _aside({"stated:": self.stated_l0})
        return (
            f"FVU {self.fvu:.3g}{of_fvu}, L0 {self.l0:.3g}{of_l0}, {self.dead:.0%} of its features silent, on "
            f"{self.tokens:,} tokens"
        )


def _aside(figures: dict[str, float | None]) -> str:
    told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if value is not None)
    return f" ({told})" if told else ""


@torch.no_grad()
def measure_fit(sae: Sae, x: Float[Tensor, "tokens d"]) -> Fit:
    """Tries an SAE on some rows of the stream that it is used on. FVU is that of :mod:`rmscope.sae.metrics`."""
    active = sae.active(x)
    variance = float((x.double() - x.double().mean(dim=0)).square().sum())
    dealt = torch.randperm(sae.m, generator=torch.Generator().manual_seed(0)).to(active.feature.device)
    shuffled = Active(active.token, dealt[active.feature], active.value, active.n_tokens)
    scale = 1 / variance if variance else float("nan")
    stated_fvu, stated_l0 = stated_figures(sae)
    return Fit(
        tokens=len(x),
        fvu=_error(sae, x, active) * scale,
        shuffled_fvu=_error(sae, x, shuffled) * scale,
        l0=len(active.value) / len(x),
        dead=1 - len(active.feature.unique()) / sae.m,
        stated_fvu=stated_fvu,
        stated_l0=stated_l0,
    )


def stated_figures(sae: Sae) -> tuple[float | None, float | None]:
    """FVU and L0, as the config or the card of an SAE states them."""
    stated = (sae.metadata.get("fvu"), sae.cfg.get("k", sae.metadata.get("l0")))
    fvu, l0 = (float(value) if isinstance(value, int | float) else None for value in stated)
    return fvu, l0


def _error(sae: Sae, x: Float[Tensor, "tokens d"], active: Active) -> float:
    return float((x.double() - sae.decode_active(active).double()).square().sum())


def same_model(stated: str, names: list[str]) -> bool:
    """Whether a model's name, as an SAE's card gives it, is one of some names, whoever hosts it."""
    return stated.rsplit("/", 1)[-1].lower() in {name.rstrip("/").rsplit("/", 1)[-1].lower() for name in names}
