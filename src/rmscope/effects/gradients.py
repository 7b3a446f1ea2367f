"""Estimated ablation effects, from gradients: attribution patching at the clean point, and coloured midpoints.

``atp``: to first order, ablating feature j from a response changes its reward by Σ_t f_tj <dr/dx_t, d_j>, t over the span
(attribution patching; Syed et al. 2023, arXiv 2310.10348, eq. 2, with the ablated activation as the patch). One
backward pass gives dr/dx at every site at once and serves every feature; effects live at active entries only.

``midpoint``: the gradient halfway to the ablation, <dr/dx at x - v_j/2, v_j> with v_j the feature's part of the stream,
is right to second order, but costs as much as the ablation. Features are therefore put into colours, the ones that begin at
a token into different ones, and those of a colour are moved together, by half and with alternating signs s_j, so that what
they do to one another's gradients cancels: R_j is about <g, v_j> + s_j <g' - g, v_j>, g clean and g' at x - Σ s_k v_k / 2 (a
probed diagonal of the Hessian; Bekas, Kokiopoulou and Saad 2007). A backward pass a colour serves all.

Not exact: estimates are shown with their measured quality and claimed only after exact ablation (``ablation.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.packing import Batch, Text
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Active, Sae

Method = Literal["atp", "midpoint"]
METHODS: tuple[Method, ...] = ("atp", "midpoint")
PROBE_GROUPS = 32
"""Backward passes of ``midpoint``."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """One response at one site: its active features (ascending), their estimated ablation effects, and Σ_t f_tj |d_j|."""

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


def attribute_text(sae: Sae, active: Active, gradient: Float[Tensor, "span d"], text: Text) -> Estimates:
    """One response's estimates from its active features and one gradient on the span."""
    return _estimates(sae, active, (gradient.float()[active.token] * sae.W_dec[active.feature]).sum(-1), text)


def _estimates(sae: Sae, active: Active, products: Float[Tensor, " nnz"], text: Text) -> Estimates:
    """``products``: <gradient, d_j> at each active entry."""
    feature, effect = sum_by_feature(active, active.value * products)
    _, mass = sum_by_feature(active, active.value)
    return Estimates(text.pair, text.side, feature, effect, mass * sae.W_dec[feature].norm(dim=-1))


def midpoints(
    rm: RewardModel, sae: Sae, site: str, batch: Batch, x: Float[Tensor, "rows width d"], actives: Sequence[Active]
) -> Iterator[Estimates]:
    """Every text's estimates by coloured midpoints; ``x`` is the clean stream, ``actives`` holds each text's features."""
    coloured = [colours_of(active) for active in actives]
    clean = _products(rm, sae, site, batch, x, actives)
    products = [p.clone() for p in clean]
    for colour in range(PROBE_GROUPS):
        point = x.clone()
        for text, active, (mine, sign) in zip(batch.texts, actives, coloured, strict=True):
            at = mine == colour
            halves = -0.5 * (sign * active.value)[at, None] * sae.W_dec[active.feature[at]]
            point[text.row].index_add_(0, text.span[active.token[at]].to(x.device), halves.to(x))
        moved = _products(rm, sae, site, batch, point, actives)
        for product, before, after, (mine, sign) in zip(products, clean, moved, coloured, strict=True):
            at = mine == colour
            product[at] += (sign * (after - before))[at]
    for text, active, product in zip(batch.texts, actives, products, strict=True):
        yield _estimates(sae, active, product, text)


def _products(
    rm: RewardModel, sae: Sae, site: str, batch: Batch, point: Float[Tensor, "rows width d"], actives: Sequence[Active]
) -> list[Float[Tensor, " nnz"]]:
    """<dr/dx at a point of the stream, d_j> at each text's active entries."""
    point = point.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(rm.rewards_from(batch, site, point).sum(), point)
    found = []
    for text, active in zip(batch.texts, actives, strict=True):
        g = gradient[text.row, text.span.to(point.device)].float().cpu()
        found.append((g[active.token] * sae.W_dec[active.feature]).sum(-1))
    return found


def colours_of(active: Active) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """(colour, sign) of each active entry's feature: features take turns in the order of their first firing, and those of a
    colour alternate in sign, the first at +1."""
    feature, place = torch.unique(active.feature, return_inverse=True)
    first = torch.full_like(feature, active.n_tokens).scatter_reduce_(0, place, active.token, "amin")
    rank = torch.empty_like(feature)
    rank[first.argsort(stable=True)] = torch.arange(feature.numel())
    return (rank % PROBE_GROUPS)[place], (1 - 2 * (rank // PROBE_GROUPS % 2))[place]


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
    method: Method = "atp",
) -> Iterator[tuple[str, Estimates]]:
    """(site, estimates) of every response of the pairs in ``unit``; with ``atp`` all sites share one backward pass."""
    done = 0
    for batch in rm.unit_batches(tokens, unit):
        if method == "atp":
            at = streams_and_gradients(rm, batch, list(saes))
            for text in batch.texts:
                for site, sae in saes.items():
                    x, gradient = (t[text.row, text.span.to(t.device)].float().cpu() for t in at[site])
                    yield site, attribute_text(sae, sae.active(x), gradient, text)
        else:
            streams = rm.streams(batch, list(saes))
            for site, sae in saes.items():
                x = streams[site]
                spans = [x[text.row, text.span.to(x.device)].float().cpu() for text in batch.texts]
                for one in midpoints(rm, sae, site, batch, x, [sae.active(span) for span in spans]):
                    yield site, one
        done += len({t.pair for t in batch.texts})
        progress(done, len(unit), "pairs attributed")
