"""An SAE as a reader gives it, and the folding of conventions into its weights, which changes no feature.

Conventions differ in where b_dec is subtracted, in the norm of the decoder rows, and in the scale of x. Readers fold all of
it into the weights, so that every SAE encodes x - b_dec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmscope.errors import InputError

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StoredSae:
    """An SAE that encodes x - b_dec, as it is read from, or written to, a file."""

    architecture: str
    weights: Weights
    """W_enc [d, m], W_dec [m, d], b_dec [d], all others [m]."""
    site: str
    """Such as ``resid_post.6``; empty where the file does not name it."""
    metadata: dict[str, Any]
    """Whatever came with the file. ``model_name``: the model that it was trained on; ``l0`` and ``fvu``: what is stated of
    it."""
    settings: dict[str, Any]
    """The family's own settings, such as k."""


def check_shapes(weights: Weights) -> None:
    """Checks, before anything is folded: W_enc [d, m], W_dec [m, d], b_dec [d], all others [m], all of finite numbers."""
    missing = {"W_enc", "W_dec", "b_dec"} - weights.keys()
    if missing or weights["W_dec"].ndim != 2:
        raise InputError(f"These SAE weights contain no {', '.join(sorted(missing)) or 'decoder matrix'}.")
    m, d = weights["W_dec"].shape
    for name, w in weights.items():
        expected = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,)}.get(name, (m,))
        if tuple(w.shape) != expected:
            raise InputError(f"The SAE's weights contradict each other: {name} is {list(w.shape)} beside W_dec {[m, d]}.")
        if not torch.isfinite(w).all():
            raise InputError(f"The SAE's {name} holds values that are not finite; the file is damaged, fetch it again.")


def unsubtract(weights: Weights) -> None:
    """Folds an encoder of x itself into one of x - b_dec: x W + b = (x - b_dec) W + (b + b_dec W)."""
    shift = weights["b_dec"].double() @ weights["W_enc"].double()
    for name in ("b_enc", "b_gate"):
        if name in weights:
            weights[name] = (weights[name].double() + shift).float()
    if "b_mag" in weights:
        weights["b_mag"] = (weights["b_mag"].double() + weights["r_mag"].double().exp() * shift).float()


def unit_decoder(weights: Weights, *, with_threshold: bool = True) -> None:
    """Makes the decoder rows d_j unit and measures features as f_j |d_j|; the reconstruction stays the same.

    A feature whose row is zero does nothing, and never fires. Where the threshold is one of f_j |d_j| already, it stays.
    """
    norms = weights["W_dec"].norm(dim=1)
    weights["W_dec"] = weights["W_dec"] / torch.where(norms > 0, norms, 1.0)[:, None]
    if "r_mag" in weights:  # only the magnitude is scaled: of the gate, only the sign counts
        lives = norms > 0
        weights["r_mag"] = torch.where(lives, weights["r_mag"] + norms.log(), 0.0)
        weights["b_mag"] = weights["b_mag"] * norms
        weights["b_gate"] = weights["b_gate"] * lives
        weights["W_enc"] = weights["W_enc"] * lives
        return
    weights["W_enc"] = weights["W_enc"] * norms
    for name in ("b_enc", "threshold") if with_threshold else ("b_enc",):
        if name in weights:
            weights[name] = weights[name] * norms


def raw_scale(weights: Weights, scale: float) -> None:
    """Turns an SAE of scale * x into one of x, with features in the units of x."""
    for name in ("b_enc", "b_dec", "threshold"):
        if name in weights:
            weights[name] = weights[name] / scale


def equal_thresholds(weights: Weights, threshold: float) -> None:
    """One threshold for all features."""
    weights["threshold"] = torch.full((weights["W_dec"].shape[0],), threshold)


def topk_settings(k: Any, where: str) -> dict[str, Any]:
    """The settings of a TopK SAE. InputError where its k is no whole number above 0."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InputError(f"{where}: this TopK SAE does not name its k (found: {k!r}); add it to its config.")
    return {"k": k}
