"""Slow dense twins: the equations of the papers in autograd, float64; nothing is shared with the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Twin = dict[str, Tensor]


def leaves(sae: torch.nn.Module) -> Twin:
    return {name: p.detach().clone().double().requires_grad_() for name, p in sae.named_parameters()}


def pre_activations(w: Twin, x: Tensor) -> Tensor:
    return (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def mean_square(e: Tensor) -> Tensor:
    return e.square().sum(1).mean()


def auxk_loss(w: Twin, h: Tensor, error: Tensor, dead: Tensor | None, k_aux: int, alpha: float) -> Tensor:
    """Gao et al. 2024, A.2: α |e - e^|², e fixed, e^ = z W_dec over the top dead features."""
    if dead is None or not dead.any():
        return torch.zeros((), dtype=h.dtype)
    among_dead = h.masked_fill(~dead, -torch.inf)
    chosen = torch.zeros_like(h).scatter(1, among_dead.topk(min(k_aux, int(dead.sum())), dim=1).indices, 1.0)
    return alpha * mean_square(error.detach() - (chosen * h.relu()) @ w["W_dec"])


def topk_loss(w: Twin, x: Tensor, k: int, dead: Tensor | None, k_aux: int, alpha: float) -> Tensor:
    """Gao et al. 2024: L = |x - x^|² + AuxK."""
    h = pre_activations(w, x)
    f = torch.zeros_like(h).scatter(1, h.topk(k, dim=1).indices, 1.0) * h.relu()
    e = x - f @ w["W_dec"] - w["b_dec"]
    return mean_square(e) + auxk_loss(w, h, e, dead, k_aux, alpha)


def matryoshka_loss(
    w: Twin, x: Tensor, k: int, sizes: tuple[int, ...], dead: Tensor | None, k_aux: int, alpha: float
) -> Tensor:
    """Bussmann et al. 2025: Σ_i |x - f[:m_i] W_dec[:m_i] - b_dec|² + AuxK; f by BatchTopK (Bussmann 2024)."""
    h = pre_activations(w, x)
    kept = torch.zeros(h.numel(), dtype=h.dtype).scatter(0, h.flatten().topk(k * len(x)).indices, 1.0)
    f = kept.view_as(h) * h.relu()
    errors = [x - f[:, :size] @ w["W_dec"][:size] - w["b_dec"] for size in sizes]
    return sum(map(mean_square, errors), auxk_loss(w, h, errors[-1], dead, k_aux, alpha))


class Jump(torch.autograd.Function):
    """Rajamanoharan et al. 2024b, equation 11: h H(h - θ)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        return h * (h > theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        kernel = (((h - theta) / ctx.width).abs() < 0.5).to(h.dtype)
        return g * (h > theta), (-theta / ctx.width * kernel * g).sum(0), None


class Heaviside(Jump):
    """Equation 12: H(h - θ), which says nothing to h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, width: float) -> Tensor:
        return Jump.forward(ctx, h, theta, width).detach().sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        kernel = (((h - theta) / ctx.width).abs() < 0.5).to(h.dtype)
        return torch.zeros_like(h), (-1 / ctx.width * kernel * g).sum(0), None


def jumprelu_loss(w: Twin, x: Tensor, l0: float, width: float, dead: Tensor | None, preact: float) -> Tensor:
    """Section 3: |x - x^|² + λ |f|_0; and Σ relu(θ - h) |d| over the dead (Anthropic, January 2025)."""
    h, theta = pre_activations(w, x), w["threshold"]
    x_hat = Jump.apply(h, theta, width) @ w["W_dec"] + w["b_dec"]
    loss = mean_square(x - x_hat) + l0 * Heaviside.apply(h, theta, width).sum(1).mean()
    if dead is not None:
        short = (theta - h).relu() * w["W_dec"].norm(dim=1)
        loss = loss + preact * short[:, dead].sum(1).mean()
    return loss


def standard_loss(w: Twin, x: Tensor, l1: float) -> Tensor:
    """Anthropic, April 2024: |x - x^|² + λ Σ f |d|."""
    f = pre_activations(w, x).relu()
    sparsity = (f * w["W_dec"].norm(dim=1)).sum(1).mean()
    return mean_square(x - f @ w["W_dec"] - w["b_dec"]) + l1 * sparsity


def gated_loss(w: Twin, x: Tensor, l1: float) -> Tensor:
    """Rajamanoharan et al. 2024: reconstruction + λ |relu(π)| (decoder norms) + frozen-decoder auxiliary."""
    u = (x - w["b_dec"]) @ w["W_enc"]
    gate, magnitude = u + w["b_gate"], w["r_mag"].exp() * u + w["b_mag"]
    x_hat = ((gate > 0) * magnitude.relu()) @ w["W_dec"] + w["b_dec"]
    by_gate = gate.relu() @ w["W_dec"].detach() + w["b_dec"].detach()
    sparsity = (gate.relu() * w["W_dec"].norm(dim=1)).sum(1).mean()
    return (x - x_hat).square().sum(1).mean() + l1 * sparsity + (x - by_gate).square().sum(1).mean()


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Fraction of variance unexplained, centred per dimension, summed over dimensions."""
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
