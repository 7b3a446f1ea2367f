"""Estimated removal effects: attribution patching at the clean point.

To first order, removing feature j from a response changes its reward by Σ_t f_tj <dr/dx_t, d_j>, t over the span
(attribution patching; Syed et al. 2023, arXiv 2310.10348, eq. 2, with the removed activation as the patch). One
backward pass gives dr/dx at every site at once and serves every feature; effects live at active entries only.
Not exact: shown with a trust score (``trust.py``), claimed only after exact removal (``removal.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.files import Progress, silent
from rmscope.model.packing import Batch, Text
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Active, Sae


@dataclass(frozen=True, slots=True)
class Estimates:
    """One response at one site: its active features (ascending), their estimated removal effects, and Σ_t f_tj |d_j|."""

    pair: int
    side: str
    feature: Int[Tensor, " active"]
    effect: Float[Tensor, " active"]
    mass: Float[Tensor, " active"]


def watch(store: dict[str, Tensor], site: str, first: bool) -> Callable[[Tensor], Tensor]:
    """An edit that keeps the stream for its gradient; at the first site the graph starts there."""

    def edit(x: Tensor) -> Tensor:
        if first:
            x = x.detach().requires_grad_(True)
        store[site] = x
        return x

    return edit


def streams_and_gradients(
    rm: RewardModel, batch: Batch, sites: Sequence[str]
) -> dict[str, tuple[Float[Tensor, "rows width d"], Float[Tensor, "rows width d"]]]:
    """(x, dr/dx) at each site, from one forward and one backward pass.

    In a packed row the prefix belongs to both texts, so its gradient is that of the sum of the two rewards; spans start
    behind it and are each text's own.
    """
    ordered = sorted(sites, key=rm.site_index)
    kept: dict[str, Tensor] = {}
    with torch.enable_grad():
        rewards = rm.rewards(batch, {site: watch(kept, site, site == ordered[0]) for site in ordered})
        gradients = torch.autograd.grad(rewards.sum(), [kept[site] for site in ordered])
    return {site: (kept[site].detach(), g) for site, g in zip(ordered, gradients, strict=True)}


def attribute_text(sae: Sae, x: Float[Tensor, "span d"], gradient: Float[Tensor, "span d"], text: Text) -> Estimates:
    """One response's estimates from the stream and its gradient on the span."""
    active = sae.active(x.float())
    products = (gradient.float()[active.token] * sae.W_dec[active.feature]).sum(-1)
    feature, effect = sum_by_feature(active, active.value * products)
    _, mass = sum_by_feature(active, active.value)
    return Estimates(text.pair, text.side, feature, effect, mass * sae.W_dec[feature].norm(dim=-1))


def sum_by_feature(active: Active, values: Float[Tensor, " nnz"]) -> tuple[Tensor, Tensor]:
    """(distinct features, the sum of ``values`` over each one's entries)."""
    feature, place = torch.unique(active.feature, return_inverse=True)
    return feature, torch.zeros(feature.numel(), dtype=values.dtype).index_add_(0, place, values)


def estimate(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    unit: Sequence[int],
    progress: Progress = silent,
) -> Iterator[tuple[str, Estimates]]:
    """(site, estimates) of every response of the pairs in ``unit``; all sites share one backward pass."""
    done = 0
    for batch in rm.unit_batches(tokens, unit):
        at = streams_and_gradients(rm, batch, list(saes))
        for text in batch.texts:
            for site, sae in saes.items():
                x, gradient = (t[text.row, text.span.to(t.device)].cpu() for t in at[site])
                yield site, attribute_text(sae, x, gradient, text)
        done += len({t.pair for t in batch.texts})
        progress(done, len(unit), "pairs attributed")
