"""Contributions and the ledger: the parts of a pair's reward difference, which sum to it.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, eq. 1), all features moving together. On the span the
stream goes along the straight line from a baseline x0 to x. With G_t the mean gradient on it (Gauss-Legendre quadrature),

    A_j   = Σ_t (f_tj - f0_j) <G_t, d_j>          features, active and silent
    A_err = Σ_t <G_t, e_t - e0>                   the SAE's error
    A_c   = Σ_t <G_t, c>                          the constant, c = decode(f0) + e0 - x0
    Σ_j A_j + A_err + A_c = r(x) - r(x0)          up to quadrature: the gap

The path is cut into panels. A panel is halved until the rewards at its ends agree with the integral (:func:`integrate`).

Decoding is linear, so one gradient per node serves every feature: active entries one by one, the baseline's part of all
silent features by one product with W_dec. With the ``mean`` baseline f0 and e0 are means over the dataset; with ``zero``
f0 = 0 and e0 = 0. Both begin at x0 = decode(f0) + e0, so their constant is 0. A difference SAE's path begins at x0 = 0, the
base's own stream: its constant is b_dec, and the remainder is inherited from the base. Ledger of a pair: Δr = features +
error + constant + remainder + gap, with remainder = r(x0 chosen) - r(x0 rejected).
Over a dataset, the share of a part is Cov(part, Δr) / Var(Δr).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rmscope.effects.gradients import Estimates, Stream, derivatives, gradient_at, on_span, sum_by_feature
from rmscope.io import Progress, silent
from rmscope.model.packing import Batch, pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.sae.joint import JointSae
from rmscope.statistics import interval

NODES = 4
"""Gauss-Legendre nodes in a panel."""
CUTS = (0.0, 0.5, 1.0)
"""The first panels of a path."""
HALVINGS = 6
"""A first panel is halved at most this often: no rule closes the gaps of float32 noise and of kinks (ReLU)."""
MARGIN = 4
"""The gaps of features and error can cancel within a response, so only a fourth of the allowed gap is accepted."""
BOUND, FLOOR = 0.01, 0.1
"""A pair's gap may be .01 max(|Δr|, .1 SD(Δr))."""
SILENT = -1
"""The feature number of the sum of all silent features in a contribution table."""
PARTS = ("features", "error", "constant", "remainder", "gap")
FEWEST = 8
"""A group of fewer pairs gets no shares."""
TOKENS = 5
"""Tokens that are shown for a feature of a pair."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where the path starts: f0 [m], e0 [d], x0 [d], and the constant c = decode(f0) + e0 - x0 [d]."""

    f: Float[Tensor, " m"]
    e: Float[Tensor, " d"]
    x: Float[Tensor, " d"]
    constant: Float[Tensor, " d"]


@dataclass(frozen=True, slots=True)
class SideParts:
    """One response: its active features with their contributions, that of all silent ones and of the error, r(x0), r(x)."""

    pair: int
    side: str
    feature: Int[Tensor, " active"]
    effect: Float[Tensor, " active"]
    mass: Float[Tensor, " active"]
    """Σ_t f_tj |d_j|."""
    silent: float
    error: float
    constant: float
    start: float
    end: float
    nodes: int
    """Gradients that its path took."""

    @property
    def features(self) -> float:
        """The contribution of all features together."""
        return float(self.effect.sum()) + self.silent


def baseline(
    sae: Sae, kind: Literal["mean", "zero", "base"], f_mean: Tensor | None = None, x_mean: Tensor | None = None
) -> Baseline:
    """``mean`` needs the dataset means of f [m] and x [d]; e0 is then mean x - decode(mean f), the mean of e.

    ``base`` is for difference SAEs: x0 = 0, where the whole stream is the base's. The SAE's b_dec is then the constant.
    """
    if kind == "mean":
        assert f_mean is not None
        assert x_mean is not None
        f, e = f_mean, x_mean - sae.decode(f_mean[None])[0]
    else:
        f, e = torch.zeros_like(sae.W_dec[:, 0]), torch.zeros_like(sae.b_dec)
    start = sae.decode(f[None])[0] + e
    x0 = torch.zeros_like(start) if kind == "base" else start
    return Baseline(f, e, x0, start - x0)


def joint_baseline(sae: JointSae, f_mean: Float[Tensor, " m"], x_mean: Float[Tensor, " two_d"]) -> Baseline:
    """The start at a site ``both.L``: nothing written, and the mean of the base's stream."""
    m, d = sae.difference.m, sae.base.d
    parts = baseline(sae.difference, "base"), baseline(sae.base, "mean", f_mean[m:], x_mean[d:])
    return Baseline(*(torch.cat([getattr(part, name) for part in parts]) for name in ("f", "e", "x", "constant")))


class Path:
    """The straight path of every text of a batch, all at once: rewards and gradients at any share of it."""

    def __init__(self, rm: RewardModel, site: str, batch: Batch, x0: Float[Tensor, " d"]) -> None:
        self.rm, self.site, self.batch = rm, site, batch
        self.x = rm.streams(batch, [site])[site]
        inside = torch.zeros(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        for text in batch.texts:
            inside[text.row, text.span.to(self.x.device)] = True
        self.step = torch.where(inside[..., None], self.x - x0.to(self.x), 0.0)
        self.rows, self.texts = torch.arange(len(batch.ids)), torch.arange(len(batch.texts))
        self._rewards: dict[float, Float[Tensor, " texts"]] = {}

    def only(self, rows: Bool[Tensor, " rows"]) -> Path:
        """The path of these rows alone; its ``rows`` and ``texts`` are their numbers in the whole batch."""
        part, texts = copy(self), rows[self.row_of]
        part.batch = self.batch.only(rows.nonzero().flatten())
        part.x, part.step, part.rows, part.texts = self.x[rows], self.step[rows], self.rows[rows], self.texts[texts]
        part._rewards = {share: rewards[texts] for share, rewards in self._rewards.items()}
        return part

    @property
    def row_of(self) -> Int[Tensor, " texts"]:
        return torch.tensor([t.row for t in self.batch.texts])

    def at(self, share: float) -> Stream:
        return self.x - (1 - share) * self.step

    def rewards(self, share: float) -> Float[Tensor, " texts"]:
        if share not in self._rewards:
            with torch.no_grad():
                self._rewards[share] = self.rm.rewards_from(self.batch, self.site, self.at(share))
        return self._rewards[share]

    def gradient(self, share: float) -> Stream:
        return gradient_at(self.rm, self.batch, self.site, self.at(share))

    def panel(self, low: float, high: float) -> Panel:
        """Gauss-Legendre on one stretch. The rewards at its ends give the gap."""
        integral = torch.zeros_like(self.x)
        for point, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
            share = low + (high - low) * 0.5 * (1 + float(point))
            integral += 0.5 * float(weight) * (high - low) * self.gradient(share)
        along = (integral * self.step).sum(-1).double()
        sums = torch.stack([along[t.row, t.span.to(along.device)].sum() for t in self.batch.texts])
        gaps = self.rewards(high).double() - self.rewards(low).double() - sums
        return Panel(self, low, high, integral, gaps.cpu())


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """A stretch of a path: the integral of the gradient along it, and each text's gap on it."""

    path: Path
    low: float
    high: float
    gradient: Stream
    gaps: Float[Tensor, " texts"]

    def only(self, rows: Bool[Tensor, " rows"]) -> Panel:
        return Panel(self.path.only(rows), self.low, self.high, self.gradient[rows], self.gaps[rows[self.path.row_of]])

    def halved(self, rows: Bool[Tensor, " rows"] | None = None) -> list[Panel]:
        """Both halves, computed again, of these rows or of all."""
        path, middle = self.path if rows is None else self.path.only(rows), (self.low + self.high) / 2
        return [path.panel(self.low, middle), path.panel(middle, self.high)]


def integrate(path: Path, tolerance: float, halvings: int = HALVINGS) -> list[Panel]:
    """Panels whose gaps add up to at most ``tolerance`` / 4 for every text of the batch, unless ``halvings`` are used up.

    The rewards at a panel's ends give its error without a second rule. Only panels with a large gap are done again. Each row
    of the batch has panels of its own, so they do not depend on the other rows.
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


def parts_along(path: Path, panels: Sequence[Panel], sae: Sae, start: Baseline) -> Iterator[SideParts]:
    """The parts of every response of a path's batch, from the gradients of ``panels``."""
    mean_gradient, nodes = torch.zeros_like(path.x), torch.zeros(len(path.rows), dtype=torch.long)
    for panel in panels:
        mean_gradient[panel.path.rows] += panel.gradient
        nodes[panel.path.rows] += NODES
    first, end = path.rewards(0.0), path.rewards(1.0)
    for i, text in enumerate(path.batch.texts):
        x, g = on_span(path.x, text), on_span(mean_gradient, text)
        active = sae.active(x)
        feature, total = sum_by_feature(active, active.value)
        _, presence = sum_by_feature(active, active.value * derivatives(sae, active, g))
        pull = sae.W_dec @ g.sum(0)  # <Σ_t G_t, d_j>, all features
        absent = -(start.f * pull)
        absent[feature] = 0.0
        yield SideParts(
            text.pair,
            text.side,
            feature,
            effect=presence - start.f[feature] * pull[feature],
            mass=total * sae.W_dec[feature].norm(dim=-1),
            silent=float(absent.sum()),
            error=float((g * (x - sae.decode_active(active) - start.e)).sum()),
            constant=float(g.sum(0) @ start.constant),
            start=float(first[i]),
            end=float(end[i]),
            nodes=int(nodes[text.row]),
        )


def estimate_along_path(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    unit: Sequence[int],
    progress: Progress = silent,
) -> Iterator[tuple[str, Estimates]]:
    """(site, estimates): contributions from the zero baseline, taken as ablation effects.

    Two panels of Gauss-Legendre nodes, none halved: eight gradients per site.
    """
    done = 0
    for batch in rm.unit_batches(tokens, unit):
        for site, sae in saes.items():
            start = baseline(sae, "zero")
            path = Path(rm, site, batch, start.x)
            panels = [path.panel(low, high) for low, high in pairwise(CUTS)]
            for p in parts_along(path, panels, sae, start):
                yield site, Estimates(p.pair, p.side, p.feature, p.effect, p.mass)
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
        path = Path(rm, site, batch, start.x)
        for parts in parts_along(path, integrate(path, BOUND * FLOOR * sd / 2, halvings), sae, start):
            sides = waiting.setdefault(parts.pair, {})
            sides[parts.side] = parts
            if len(sides) == 2:
                yield parts.pair, pair_ledger(sides["chosen"], sides["rejected"], sd), sides
                done += 1
        progress(done, len(unit), "ledgers")


def pair_ledger(chosen: SideParts, rejected: SideParts, sd: float) -> dict[str, float]:
    """Δr and its parts, which sum to it, the gradients along the longer of the two paths, and whether the ledger is closed.

    One whose halvings were used up may stay open: its gap is larger than the bound.
    """
    delta, remainder = chosen.end - rejected.end, chosen.start - rejected.start
    parts = {name: getattr(chosen, name) - getattr(rejected, name) for name in ("features", "error", "constant")}
    gap, nodes = delta - sum(parts.values()) - remainder, max(chosen.nodes, rejected.nodes)
    closed = abs(gap) <= BOUND * max(abs(delta), FLOOR * sd)
    return {"delta_r": delta, **parts, "remainder": remainder, "gap": gap, "nodes": nodes, "closed": closed}


def shares(parts: Float[np.ndarray, "pairs parts"], delta: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " parts"]:
    """Cov(part, Δr) / Var(Δr) of each part; they sum to 1."""
    centred = delta - delta.mean()
    return (parts - parts.mean(0)).T @ centred / (centred @ centred)


def share_rows(ledger: pl.DataFrame, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The share of each part with its 95 % interval (part, value, low, high), resampling ``prompts``, one per pair.

    The constant is left out where it is always 0: only the ledgers of difference SAEs have one.
    """
    parts = [part for part in PARTS if part != "constant" or (ledger[part] != 0).any()]
    table, rows = ledger.select("delta_r", *parts).to_numpy(), []
    for i, part in enumerate(parts):
        share = interval(table, prompts, lambda v, i=i: float(shares(v[:, 1:], v[:, 0])[i]))  # type: ignore[misc]
        rows.append({"part": part, "value": share.value, "low": share.low, "high": share.high})
    return rows


def shares_by(ledger: pl.DataFrame, groups: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The shares within each group of pairs, by the group's name: group, pairs, part, value, low, high."""
    table = []
    for name in sorted(set(groups)):
        inside = np.asarray(groups) == name
        if inside.sum() >= FEWEST:
            rows = share_rows(ledger.filter(pl.Series(inside)), np.asarray(prompts)[inside].tolist())
            table += [{"group": name, "pairs": int(inside.sum()), **row} for row in rows]
    return table


def length_groups(difference: Int[np.ndarray, " pairs"]) -> list[str]:
    """Thirds of the pairs by tokens of chosen minus tokens of rejected, named by their range."""
    third = np.empty(len(difference), dtype=int)
    third[np.argsort(difference, kind="stable")] = np.arange(len(difference)) * 3 // max(1, len(difference))
    ranges = {t: difference[third == t] for t in np.unique(third)}
    names = {t: f"{t + 1}: chosen longer by {d.min()} .. {d.max()} tokens" for t, d in ranges.items()}
    return [names[t] for t in third]


def pair_features(
    rm: RewardModel, sae: Sae, site: str, tokens: PairTokens, contribution: pl.DataFrame, top: int
) -> pl.DataFrame:
    """A pair's largest contributions on each side (``top`` each): side, feature, effect, activation, tokens.

    ``contribution`` holds the pair's rows. ``activation`` is Σ_t f_tj. ``tokens`` are the texts of the tokens on which the
    feature fires most, strongest first.
    """
    rows = []
    for side in SIDES:
        ids = tokens.side(side)
        batch = pad_texts([(0, side, ids, tokens.divergence, rm.read_position(ids))], 0)
        active = sae.active(on_span(rm.streams(batch, [site])[site], batch.texts[0]))
        total = dict(zip(*(t.tolist() for t in sum_by_feature(active, active.value)), strict=True))
        shown = contribution.filter(pl.col("side") == side).sort(pl.col("effect").abs(), descending=True).head(top)
        for row in shown.select("side", "feature", "effect").iter_rows(named=True):
            at = active.feature == row["feature"]
            order = active.value[at].argsort(descending=True)[:TOKENS]
            fires = [rm.tokenizer.decode([int(ids[tokens.divergence + t])]) for t in active.token[at][order]]
            text = "(silent features)" if row["feature"] == SILENT else "|".join(fires)
            rows.append({**row, "activation": total.get(row["feature"], 0.0), "tokens": text})
    schema = {"side": pl.String, "feature": pl.Int32, "effect": pl.Float32, "activation": pl.Float64, "tokens": pl.String}
    return pl.DataFrame(rows, schema=schema)
