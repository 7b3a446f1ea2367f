"""Contributions and the ledger: what a pair's reward difference is made of, summing to it.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, eq. 1), all features moving together: on the span the
stream goes along the straight line from a baseline x0 to x, and the mean gradient G_t on it (Gauss-Legendre) gives

    A_j   = Σ_t (f_tj - f0_j) <G_t, d_j>          features, active and silent
    A_err = Σ_t <G_t, e_t - e0>                   the SAE's error
    Σ_j A_j + A_err = r(x) - r(x0)                up to quadrature: the gap

The path is cut into panels, and a panel is halved until the rewards at its ends agree with the integral (see
:func:`integrate`).

Decoding is linear, so one gradient a node serves every feature: entries that fire one by one (presence), the baseline's
part of the silent ones as one product with W_dec (absence). With the ``mean`` baseline f0, e0 are means over the
dataset; with ``zero`` f0 = 0, e0 = 0. Ledger of a pair: Δr = features + error + remainder + gap, where the remainder
is r(x0 chosen) - r(x0 rejected).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmscope.effects.gradients import Estimates, sum_by_feature
from rmscope.io import Progress, silent
from rmscope.model.packing import Batch, Text
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae

NODES = 4
"""Gauss-Legendre nodes in a panel."""
CUTS = (0.0, 0.5, 1.0)
"""The first panels of a path."""
HALVINGS = 6
"""How often a first panel is halved at most: float32 noise and kinks (ReLU) leave gaps that no rule closes."""
MARGIN = 4
"""Gaps of features and error can cancel in a response's gap, so only a fourth of what is allowed is let through."""
BOUND, FLOOR = 0.01, 0.1
"""A pair's gap may be .01 max(|Δr|, .1 SD(Δr)) (METHOD, "The ledger of a pair")."""
SILENT = -1
"""The feature number under which a contribution table holds the sum of all silent features."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where the path starts: f0 [m], e0 [d], and x0 = decode(f0) + e0 [d]."""

    kind: Literal["mean", "zero"]
    f: Float[Tensor, " m"]
    e: Float[Tensor, " d"]
    x: Float[Tensor, " d"]


@dataclass(frozen=True, slots=True)
class SideParts:
    """One response: contributions of its active features, of the silent ones together, of the error, r(x0), r(x)."""

    pair: int
    side: str
    feature: Tensor
    effect: Tensor
    silent: float
    error: float
    start: float
    end: float
    nodes: int
    """Gradients that its path took."""

    @property
    def features(self) -> float:
        return float(self.effect.sum()) + self.silent


def baseline(
    sae: Sae, kind: Literal["mean", "zero"], f_mean: Tensor | None = None, x_mean: Tensor | None = None
) -> Baseline:
    """``mean`` needs the dataset means of f [m] and x [d]; e0 follows, since the mean of e is mean x - decode(mean f)."""
    if kind == "zero":
        f, e = torch.zeros_like(sae.W_dec[:, 0]), torch.zeros_like(sae.b_dec)
    else:
        assert f_mean is not None
        assert x_mean is not None
        f, e = f_mean, x_mean - sae.decode(f_mean[None])[0]
    return Baseline(kind, f, e, sae.decode(f[None])[0] + e)


class Path:
    """The straight path of every text of a batch, all at once: rewards and gradients at any share of it."""

    def __init__(self, rm: RewardModel, site: str, batch: Batch, x0: Float[Tensor, " d"]) -> None:
        self.rm, self.site, self.batch = rm, site, batch
        self.x = rm.streams(batch, [site])[site]
        on_span = torch.zeros(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        for text in batch.texts:
            on_span[text.row, text.span.to(self.x.device)] = True
        self.step = torch.where(on_span[..., None], self.x - x0.to(self.x), 0.0)
        self.rows, self.texts = torch.arange(len(batch.ids)), torch.arange(len(batch.texts))
        self._rewards: dict[float, Float[Tensor, " texts"]] = {}

    def only(self, rows: Bool[Tensor, " rows"]) -> Path:
        """The path of these rows alone; its ``rows`` and ``texts`` are their numbers in the whole batch."""
        part, texts = copy(self), rows[self.row_of]
        part.batch = self.batch.only(rows.nonzero().flatten())
        part.x, part.step, part.rows, part.texts = self.x[rows], self.step[rows], self.rows[rows], self.texts[texts]
        part._rewards = {share: found[texts] for share, found in self._rewards.items()}
        return part

    @property
    def row_of(self) -> Int[Tensor, " texts"]:
        return torch.tensor([t.row for t in self.batch.texts])

    def at(self, share: float) -> Float[Tensor, "rows width d"]:
        return self.x - (1 - share) * self.step

    def rewards(self, share: float) -> Float[Tensor, " texts"]:
        if share not in self._rewards:
            with torch.no_grad():
                self._rewards[share] = self.rm.rewards_from(self.batch, self.site, self.at(share))
        return self._rewards[share]

    def gradient(self, share: float) -> Float[Tensor, "rows width d"]:
        point = self.at(share).requires_grad_(True)
        with torch.enable_grad():
            rewards = self.rm.rewards_from(self.batch, self.site, point)
            return torch.autograd.grad(rewards.sum(), point)[0]

    def panel(self, low: float, high: float) -> Panel:
        """Gauss-Legendre on one stretch, and what the rewards at its ends say that it misses."""
        integral = torch.zeros_like(self.x)
        for point, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
            share = low + (high - low) * 0.5 * (1 + float(point))
            integral += 0.5 * float(weight) * (high - low) * self.gradient(share)
        along = (integral * self.step).sum(-1).double()
        found = torch.stack([along[t.row, t.span.to(along.device)].sum() for t in self.batch.texts])
        gaps = self.rewards(high).double() - self.rewards(low).double() - found
        return Panel(self, low, high, integral, gaps.cpu())


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """A stretch of a path: the integral of the gradient along it, and each text's gap on it."""

    path: Path
    low: float
    high: float
    gradient: Float[Tensor, "rows width d"]
    gaps: Float[Tensor, " texts"]

    def only(self, rows: Bool[Tensor, " rows"]) -> Panel:
        return Panel(self.path.only(rows), self.low, self.high, self.gradient[rows], self.gaps[rows[self.path.row_of]])

    def halved(self, rows: Bool[Tensor, " rows"] | None = None) -> list[Panel]:
        """Both halves anew, of these rows or of all."""
        path, middle = self.path if rows is None else self.path.only(rows), (self.low + self.high) / 2
        return [path.panel(self.low, middle), path.panel(middle, self.high)]


def integrate(path: Path, tolerance: float, halvings: int = HALVINGS) -> list[Panel]:
    """Panels whose gaps add up to at most ``tolerance`` / 4 for every text of the batch, or that were halved enough.

    The rewards at a panel's ends give its error without a second rule, and what is good is not done again: each row of the
    batch has panels of its own, whatever rows are beside it.
    """
    panels = [path.panel(low, high) for low, high in pairwise(CUTS)]
    shortest, tolerance = CUTS[1] * 2.0**-halvings, tolerance / MARGIN
    while True:
        gaps, counts = torch.zeros(len(path.texts), dtype=torch.double), torch.zeros(len(path.rows), dtype=torch.long)
        for p in panels:
            gaps[p.path.texts] += p.gaps.abs()
            counts[p.path.rows] += 1
        bad = [torch.zeros(len(p.path.rows), dtype=torch.bool) for p in panels]
        for rows, p in zip(bad, panels, strict=True):
            late = (gaps[p.path.texts] > tolerance) & (p.high - p.low > shortest)
            row_of = p.path.row_of
            rows[row_of[late & (p.gaps.abs() > tolerance / counts[p.path.rows][row_of])]] = True
        if not any(rows.any() for rows in bad):
            return panels
        good = [p.only(~rows) if rows.any() else p for rows, p in zip(bad, panels, strict=True) if not rows.all()]
        panels = good + [half for rows, p in zip(bad, panels, strict=True) if rows.any() for half in p.halved(rows)]


def contributions(
    rm: RewardModel, sae: Sae, site: str, batch: Batch, start: Baseline, tolerance: float, halvings: int = HALVINGS
) -> Iterator[SideParts]:
    """The parts of every response of a batch, each response's gap at most ``tolerance`` where that can be had."""
    path = Path(rm, site, batch, start.x)
    return parts_along(path, integrate(path, tolerance, halvings), sae, start)


def parts_along(path: Path, panels: Sequence[Panel], sae: Sae, start: Baseline) -> Iterator[SideParts]:
    """The parts of every response of a path's batch, from the gradients of ``panels``."""
    mean_gradient, nodes = torch.zeros_like(path.x), torch.zeros(len(path.rows), dtype=torch.long)
    for panel in panels:
        mean_gradient[panel.path.rows] += panel.gradient
        nodes[panel.path.rows] += NODES
    first, end = path.rewards(0.0), path.rewards(1.0)
    for i, text in enumerate(path.batch.texts):
        at = text.span.to(path.x.device)
        x, g = path.x[text.row, at].float().cpu(), mean_gradient[text.row, at].float().cpu()
        yield _parts(sae, start, text, x, g, float(first[i]), float(end[i]), int(nodes[text.row]))


def _parts(sae: Sae, start: Baseline, text: Text, x: Tensor, g: Tensor, first: float, end: float, nodes: int) -> SideParts:
    active = sae.active(x)
    products = (g[active.token] * sae.W_dec[active.feature]).sum(-1)
    feature, presence = sum_by_feature(active, active.value * products)
    pull = sae.W_dec @ g.sum(0)  # <Σ_t G_t, d_j>, all features
    effect = presence - start.f[feature] * pull[feature]
    absent = -(start.f * pull)
    absent[feature] = 0.0
    e = x - sae.decode_active(active)
    error = float((g * (e - start.e)).sum())
    return SideParts(text.pair, text.side, feature, effect, float(absent.sum()), error, first, end, nodes)


def estimate_along_path(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    unit: Sequence[int],
    progress: Progress = silent,
) -> Iterator[tuple[str, Estimates]]:
    """(site, estimates): contributions from the zero baseline read as ablation effects, as the reference study's screen did.

    Two panels of Gauss-Legendre nodes, none halved: eight gradients a site.
    """
    done = 0
    for batch in rm.unit_batches(tokens, unit):
        for site, sae in saes.items():
            start = baseline(sae, "zero")
            path = Path(rm, site, batch, start.x)
            panels = [path.panel(low, high) for low, high in pairwise(CUTS)]
            for text, parts in zip(batch.texts, parts_along(path, panels, sae, start), strict=True):
                active = sae.active(path.x[text.row, text.span.to(path.x.device)].float().cpu())
                _, total = sum_by_feature(active, active.value)
                mass = total * sae.W_dec[parts.feature].norm(dim=-1)
                yield site, Estimates(parts.pair, parts.side, parts.feature, parts.effect, mass)
        done += len({t.pair for t in batch.texts})
        progress(done, len(unit), "pairs attributed")


def ledger_rows(
    rm: RewardModel,
    sae: Sae,
    site: str,
    tokens: Sequence[PairTokens],
    unit: Sequence[int],
    start: Baseline,
    sd: float,
    progress: Progress = silent,
    halvings: int = HALVINGS,
) -> Iterator[tuple[int, dict[str, float], dict[str, SideParts]]]:
    """(pair, its ledger, the parts of both sides) of the pairs in ``unit``; ``sd`` is SD(Δr), which bounds the gaps."""
    waiting: dict[int, dict[str, SideParts]] = {}
    done = 0
    for batch in rm.unit_batches(tokens, unit):
        for parts in contributions(rm, sae, site, batch, start, BOUND * FLOOR * sd / 2, halvings):
            sides = waiting.setdefault(parts.pair, {})
            sides[parts.side] = parts
            if len(sides) == 2:
                yield parts.pair, pair_ledger(sides["chosen"], sides["rejected"]), sides
                done += 1
        progress(done, len(unit), "ledgers")


def pair_ledger(chosen: SideParts, rejected: SideParts) -> dict[str, float]:
    """Δr and its parts, which sum to it, and the gradients that the longer of the two paths took."""
    delta, remainder = chosen.end - rejected.end, chosen.start - rejected.start
    features, error = chosen.features - rejected.features, chosen.error - rejected.error
    gap = delta - features - error - remainder
    return {
        "delta_r": delta,
        "features": features,
        "error": error,
        "remainder": remainder,
        "gap": gap,
        "nodes": max(chosen.nodes, rejected.nodes),
    }


def shares(parts: Float[np.ndarray, "pairs parts"], delta: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " parts"]:
    """Cov(part, Δr) / Var(Δr) of each part; they sum to 1."""
    centred = delta - delta.mean()
    return (parts - parts.mean(0)).T @ centred / (centred @ centred)
