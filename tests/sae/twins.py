"""Slow dense twins: the equations of the papers in autograd, float64; nothing is shared with the library."""

from __future__ import annotations

import torch
from torch import Tensor

Twin = dict[str, Tensor]


def leaves(sae: torch.nn.Module) -> Twin:
    return {name: p.detach().clone().double().requires_grad_() for name, p in sae.named_parameters()}


def topk_loss(w: Twin, x: Tensor, k: int, dead: Tensor | None, k_aux: int, alpha: float) -> Tensor:
    """Gao et al. 2024: L = |x - x^|² + α |e - e^|², e fixed, e^ = z W_dec over the top dead features."""
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = torch.zeros_like(h).scatter(1, h.topk(k, dim=1).indices, 1.0) * h.relu()
    x_hat = f @ w["W_dec"] + w["b_dec"]
    loss = (x - x_hat).square().sum(1).mean()
    if dead is None or not dead.any():
        return loss
    among_dead = h.masked_fill(~dead, -torch.inf)
    chosen = torch.zeros_like(h).scatter(1, among_dead.topk(min(k_aux, int(dead.sum())), dim=1).indices, 1.0)
    z = chosen * h.relu()
    return loss + alpha * ((x - x_hat).detach() - z @ w["W_dec"]).square().sum(1).mean()


def gated_loss(w: Twin, x: Tensor, l1: float) -> Tensor:
    """Rajamanoharan et al. 2024: reconstruction + λ |relu(π)| (decoder norms) + frozen-decoder auxiliary."""
    u = (x - w["b_dec"]) @ w["W_enc"]
    gate, magnitude = u + w["b_gate"], w["r_mag"].exp() * u + w["b_mag"]
    x_hat = ((gate > 0) * magnitude.relu()) @ w["W_dec"] + w["b_dec"]
    by_gate = gate.relu() @ w["W_dec"].detach() + w["b_dec"].detach()
    sparsity = (gate.relu() * w["W_dec"].norm(dim=1)).sum(1).mean()
    return (x - x_hat).square().sum(1).mean() + l1 * sparsity + (x - by_gate).square().sum(1).mean()
