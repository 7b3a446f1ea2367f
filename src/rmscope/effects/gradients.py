"""Estimated ablation effects from gradients: attribution patching at the clean point, or midpoints of probe groups.

``atp``: to first order, ablating feature j from a response changes its reward by Σ_t f_tj <dr/dx_t, d_j>, t over the span
(attribution patching; Syed et al. 2023, arXiv 2310.10348, eq. 2, with the ablated activation as the patch). One backward
pass gives dr/dx at all sites and serves every feature. Only active entries have effects.

``midpoint``: let v_j be the feature's part of the stream. The gradient halfway to the ablation, <dr/dx at x - v_j/2, v_j>,
is right to second order, but costs as much as the ablation. So features are moved in 32 probe groups, one backward pass per
group. Features that begin at the same token are in different groups. All features of a group are moved by half, with
alternating signs s_j, so that their effects on each other's gradients cancel: R_j is about <g, v_j> + s_j <g' - g, v_j>,
with g the clean gradient and g' the one at x - Σ s_k v_k / 2 (a probed diagonal of the Hessian; Bekas, Kokiopoulou and Saad
2007).

Estimates are not exact. Their quality is measured and shown, and only exact ablations (``ablation.py``) are claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.packing import Batch, Text
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import parts_of, whole_site
from rmscope.sae.base import Active, Sae

Method = Literal["atp", "midpoint"]
METHODS: tuple[Method, ...] = ("atp", "midpoint")
PROBE_GROUPS = 32
"""Backward passes of ``midpoint``."""
Stream = Float[Tensor, "rows width d"]


@dataclass(frozen=True, slots=True)
class Estimates:
    """One response at one site: its active features (ascending), their estimated ablation effects, and Σ_t f_tj |d_j|."""

    pair: int
    side: str
    feature: Int[Tensor, " active"]
    effect: Float[Tensor, " active"]
    mass: Float[Tensor, " active"]


def on_span(stream: Stream, text: Text) -> Float[Tensor, "span d"]:
    """The part of a batch's stream, or of its gradient, on the span of one text: float32 on the CPU."""
    return stream[text.row, text.span.to(stream.device)].float().cpu()


def derivatives(sae: Sae, active: Active, gradient: Float[Tensor, "span d"]) -> Float[Tensor, " nnz"]:
    """<gradient_t, d_j> at the active entries."""
    return (gradient[active.token] * sae.W_dec[active.feature]).sum(-1)


def sum_by_feature(active: Active, values: Float[Tensor, " nnz"]) -> tuple[Tensor, Tensor]:
    """(distinct features, the sum of ``values`` over the entries of each)."""
    feature, place = torch.unique(active.feature, return_inverse=True)
    return feature, torch.zeros(feature.numel(), dtype=values.dtype).index_add_(0, place, values)


def gradient_at(rm: RewardModel, batch: Batch, site: str, point: Stream) -> Stream:
    """dr/dx at a point of the stream."""
    point = point.detach().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(rm.rewards_from(batch, site, point).sum(), point)[0]


def streams_and_gradients(rm: RewardModel, batch: Batch, sites: Sequence[str]) -> dict[str, tuple[Stream, Stream]]:
    """(x, dr/dx) at each site, from one forward and one backward pass.

    In a packed row the prefix belongs to both texts, so its gradient is that of the sum of the two rewards. Spans start
    after the prefix, and each belongs to one text.
    """
    ordered = sorted({whole_site(site) for site in sites}, key=rm.site_index)
    streams: dict[str, Tensor] = {}

    def keep(x: Tensor, site: str) -> Tensor:
        streams[site] = x.detach().requires_grad_(True) if site == ordered[0] else x  # the graph starts at the first site
        return streams[site]

    with torch.enable_grad():
        kept = dict.fromkeys([*ordered, *rm.whole_sites(sites)])
        rewards = rm.rewards(batch, {site: lambda x, site=site: keep(x, site) for site in kept})  # type: ignore[misc]
        gradients = dict(zip(ordered, torch.autograd.grad(rewards.sum(), [streams[s] for s in ordered]), strict=True))
    parts = rm.split(batch, sites, {site: x.detach() for site, x in streams.items()})
    copies = {site: gradients[whole_site(site)].repeat(1, 1, len(parts_of(site))) for site in sites}  # dr/dδ = dr/db = dr/dx
    return {site: (parts[site], copies[site]) for site in sites}


def _estimates(sae: Sae, active: Active, along: Float[Tensor, " nnz"], text: Text) -> Estimates:
    """``along``: the derivative of r along d_j at each active entry."""
    feature, effect = sum_by_feature(active, active.value * along)
    _, mass = sum_by_feature(active, active.value)
    return Estimates(text.pair, text.side, feature, effect, mass * sae.W_dec[feature].norm(dim=-1))


def midpoints(rm: RewardModel, sae: Sae, site: str, batch: Batch) -> Iterator[Estimates]:
    """The estimates of every text of a batch by the midpoints of probe groups."""
    x = rm.streams(batch, [site])[site]
    actives = [sae.active(on_span(x, text)) for text in batch.texts]
    groups = [probe_groups(active) for active in actives]
    clean = _derivatives_at(rm, sae, site, batch, x, actives)
    estimated = [before.clone() for before in clean]
    for number in range(PROBE_GROUPS):
        point = x.clone()
        for text, active, (group, sign) in zip(batch.texts, actives, groups, strict=True):
            at = group == number
            halves = -0.5 * (sign * active.value)[at, None] * sae.W_dec[active.feature[at]]
            point[text.row].index_add_(0, text.span[active.token[at]].to(x.device), halves.to(x))
        moved = _derivatives_at(rm, sae, site, batch, point, actives)
        for along, before, after, (group, sign) in zip(estimated, clean, moved, groups, strict=True):
            at = group == number
            along[at] += (sign * (after - before))[at]
    for text, active, along in zip(batch.texts, actives, estimated, strict=True):
        yield _estimates(sae, active, along, text)


def _derivatives_at(
    rm: RewardModel, sae: Sae, site: str, batch: Batch, point: Stream, actives: Sequence[Active]
) -> list[Float[Tensor, " nnz"]]:
    """<dr/dx at a point of the stream, d_j> at the active entries of each text."""
    gradient = gradient_at(rm, batch, site, point)
    return [derivatives(sae, active, on_span(gradient, t)) for t, active in zip(batch.texts, actives, strict=True)]


def probe_groups(active: Active) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """(group, sign) of the feature of each active entry.

    Features are dealt out to the groups in the order of their first firing. Signs alternate within a group, from +1 on.
    """
    feature, place = torch.unique(active.feature, return_inverse=True)
    first = torch.full_like(feature, active.n_tokens).scatter_reduce_(0, place, active.token, "amin")
    rank = torch.empty_like(feature)
    rank[first.argsort(stable=True)] = torch.arange(feature.numel())
    return (rank % PROBE_GROUPS)[place], (1 - 2 * (rank // PROBE_GROUPS % 2))[place]


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
                    x, gradient = (on_span(part, text) for part in at[site])
                    active = sae.active(x)
                    yield site, _estimates(sae, active, derivatives(sae, active, gradient), text)
        else:
            for site, sae in saes.items():
                for estimates in midpoints(rm, sae, site, batch):
                    yield site, estimates
        done += len({t.pair for t in batch.texts})
        progress(done, len(unit), "pairs attributed")
