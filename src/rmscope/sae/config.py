"""Settings of SAE training. The docstring of a field is its help text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, Field

from rmscope.errors import InputError
from rmscope.settings import Seed, Settings

WIDEST, WIDEST_K = 8, 32
"""The default dictionary has at most ``WIDEST`` times d_model features, of which ``WIDEST_K`` fire on a token."""
NARROWEST, LEAST_K = 1, 4
"""The default dictionary has at least ``NARROWEST`` times d_model features, and k is at least ``LEAST_K``."""
TOKENS_PER_FEATURE = 200


class SaeConfig(Settings):
    """How the SAEs of a run are trained. Unknown keys are refused."""

    title = "SAE training"
    model_config = ConfigDict(frozen=True)

    architecture: str = "topk"
    """Family: topk, batchtopk, matryoshka, jumprelu, gated or standard."""
    init: str | None = None
    """Go on from these weights: an SAE (folder, file or hub:owner/repo/path), a folder with one per site, or a pattern with
    {site} or {L}, the block's number. Family and size are theirs. In a run, difference SAEs and other seeds start anew."""
    d_sae: int | None = Field(None, gt=0)
    """Features. Default: one per 200 tokens of the store, between 1 and 8 times d_model."""
    k: int | None = Field(None, gt=0)
    """Features that fire on a token (topk), or on average (batchtopk, matryoshka). Default: 32 at d_sae = 8 d_model, smaller
    dictionaries in proportion, at least 4."""
    l1: float = Field(2.0, ge=0)
    """Weight of the L1 penalty on gates (gated) or features (standard), relative to the summed squared error."""
    l0: float = Field(1.0, ge=0)
    """Penalty per feature that fires, relative to the summed squared error (jumprelu)."""
    bandwidth: float = Field(0.3, gt=0)
    """Width of the window around a threshold in which features move it, in units of training (jumprelu)."""
    prefixes: tuple[int, ...] | None = Field(None, min_length=1)
    """Sizes of the nested dictionaries (matryoshka). Default: 1/32, 3/32, 7/32, 15/32 and all of d_sae."""
    lr: float | None = Field(None, gt=0)
    """Adam's learning rate. Default: 4e-4 sqrt(16384 / d_sae), the scaling of Gao et al. 2024."""
    batch_size: int = Field(2048, gt=0)
    """Tokens per step."""
    tokens: int | None = Field(None, gt=0)
    """Training tokens. Default: 2 million, but at least 1 and at most 20 epochs of the store."""
    epochs: int | None = Field(None, gt=0)
    """Passes over the store, instead of ``tokens``."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate and the sparsity penalty rise from zero."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    auxk_alpha: float = Field(1 / 32, ge=0)
    """Weight of the loss by which dead features model the error (topk, batchtopk, matryoshka)."""
    auxk: int | None = Field(None, gt=0)
    """Dead features that model the error of a token (same families). Default: d_model / 2."""
    preact_alpha: float = Field(3e-6, ge=0)
    """Weight of the loss that pulls dead features up to their thresholds (jumprelu)."""
    dead_after_tokens: int = Field(200_000, gt=0)
    """A feature that was silent on this many training tokens in a row counts as dead and is revived."""
    seed: Seed = 0
    """Fixes the initial weights and the order of the tokens."""
    scale: Literal["mean_norm", "none"] = "mean_norm"
    """Units of training: scaled to mean norm sqrt(d_model), which is folded back into the weights; or the stream's own."""
    amp: bool = True
    """Decide which features fire by bfloat16 products where the hardware has fast ones; values stay float32."""
    checkpoint_steps: int = Field(500, gt=0)
    """Steps between two checkpoints."""

    def features(self, d: int, tokens: int) -> int:
        """d_sae for a stream of width d and a store of ``tokens`` tokens.

        In a dictionary too large for its text, the effect of a direction is split over dozens of features: none is detected.
        """
        return self.d_sae or min(WIDEST * d, max(NARROWEST * d, tokens // TOKENS_PER_FEATURE))

    def k_for(self, m: int, d: int) -> int:
        """k for m features on a stream of width d."""
        return self.k or max(LEAST_K, round(WIDEST_K * m / (WIDEST * d)))

    def rate(self, m: int) -> float:
        """The learning rate for m features."""
        return self.lr or 4e-4 * (16384 / m) ** 0.5

    def budget(self, n: int) -> int:
        """Training tokens for a store of n tokens."""
        if self.epochs is not None:
            return self.epochs * n
        return self.tokens or min(max(2_000_000, n), 20 * n)

    def schedule(self, step: int, steps: int) -> tuple[float, float]:
        """(share of the full learning rate, share of the full penalty) at a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
        falling = min(1.0, (steps - step) / max(1.0, self.decay * steps))
        return rising * falling, rising


TRAINING = 32
"""Bytes per feature and dimension of the stream: encoder, decoder, their gradients and Adam's two moments, float32."""


def devices_for(features: int, d: int, device: str, beside: int = 0) -> int:
    """Devices that hold the training of one SAE, each ``beside`` some bytes such as the PM's."""
    from rmscope.hardware import memory  # here, because the command line reads settings without torch

    return max(1, -(-TRAINING * features * d // max(1, memory(device) - beside)))


def check_memory(features: Sequence[int], d: int, device: str, devices: int = 1, beside: int = 0) -> None:
    """InputError where SAEs of so many features each, trained at once on streams of width d, do not fit.

    Of several devices each trains its part of the SAEs, or, where one device cannot hold an SAE beside the PM (so many bytes
    ``beside``), all train it together.
    """
    from rmscope.hardware import memory

    if devices_for(max(features), d, device, beside) == 1 or devices == 1:
        features, devices = features[: -(-len(features) // devices)], 1
    else:
        features = [max(features)]
    need, total = TRAINING * sum(features) * d, (memory(device) - beside) * devices
    if need > total:
        several = f" of {len(features)} SAEs at once" if len(features) > 1 else ""
        where = device if devices == 1 else f"{device} in {devices} processes"
        has = f"{max(0, total) / 1e9:,.0f} GB" + (" beside the PM" if beside else "")
        raise InputError(
            f"Setting d_sae {max(features)}: training{several} takes {need / 1e9:,.0f} GB at least, and {where} has "
            f"{has}; choose a smaller one{', or fewer sites at a time' if several else ''}."
        )
