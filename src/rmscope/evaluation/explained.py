"""How much of Δr one site explains, on held-out pairs: splice, keep K and ablate K, each with its controls.

*Keep K*: the list's first K features stay as they are on the span; all else comes from somewhere else,

    x'_t = x0_t + Σ_{j in K} (f_tj - f0_tj) d_j

where x0 = x^0 + e0 is, token by token, the stream of another response, its *donor*, or the dataset's mean. A donor comes
from the store, answers another prompt, and is the same for both sides of a pair; its tokens are stretched over the span.
Δr^ is the mean over donors: the question is what the kept features explain by themselves, not what one donor adds. The
*error alone* is the mirror: features of the donor, the error as it is. *Ablate K* sets the list's first K features to 0.

Everything that is chosen (the order of the list, flags, means, donors, control dictionaries) is computed from stored
responses of the select split and then frozen. The figures are measured on other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.effects.splice import ReplacedRewards, Replacement, Span, agreement, delta_r2, run_replacements, slope, splice
from rmscope.errors import InputError
from rmscope.evaluation import selection
from rmscope.evaluation.reconstruction import Evaluation, evaluate
from rmscope.evaluation.selection import Responses
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, one_minus

DONORS = 5
GRID = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ABLATE_GRID = (1, 4, 16, 64, 256)
COARSE_GRID = (0, 8, 32, 128, 512)
"""K of the control curves."""
THRESHOLDS = (0.5, 0.8, 0.9)
SELECT_PAIRS = 96
"""Select pairs on which the lists are ordered."""
MATCHED_DRAWS = 3
"""Draws of matched features for each ablated list."""
PCA_TOKENS = 20_000


class Donors:
    """Stored responses that replace others: ``of(pair)`` draws them for a pair, none of them with the pair's prompt."""

    def __init__(
        self, responses: Responses, stored_prompts: Sequence[str], prompts: Sequence[str], n: int = DONORS, seed: int = 0
    ) -> None:
        """``stored_prompts`` names the prompt of each stored pair, ``prompts`` that of each measured one."""
        self._responses, self._n, self._seed = responses, n, seed
        self._stored = np.array([stored_prompts[p] for p in responses.pair])
        self._prompts = prompts

    def of(self, pair: int) -> Int[Array, " donors"]:
        """The donors of a pair, one per prompt: the same for both sides and at every call. InputError where the store holds
        responses to too few other prompts."""
        order = np.random.default_rng([self._seed, pair]).permutation(len(self._stored))
        order = order[self._stored[order] != self._prompts[pair]]
        _, first = np.unique(self._stored[order], return_index=True)
        if len(first) < self._n:
            raise InputError(
                f"The store holds responses to {len(first)} other prompts, donors need {self._n}; harvest more pairs."
            )
        return order[np.sort(first)][: self._n]

    def x(self, pair: int, length: int) -> list[Float[Tensor, "span d"]]:
        """The donors' streams, stretched over a span of that many tokens."""
        return [stretch(self._responses.x(int(i)), length) for i in self.of(pair)]


def stretch(x: Float[Tensor, "tokens d"], length: int) -> Float[Tensor, "length d"]:
    """The rows at evenly spaced places, from the first to the last; the last one alone where there is room for one."""
    if length <= 1:
        return x[len(x) - length :]
    return x[torch.linspace(0, len(x) - 1, length).round().long()]


@dataclass(frozen=True)
class AblationBaseline:
    """What replaces the features that are not kept, and the error: donors, and beside them the means f [m], x [d]."""

    sae: Sae
    donors: Donors
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]

    def bases(self, at: Span) -> list[tuple[Float[Tensor, "span d"], Float[Tensor, "span m"]]]:
        """(x0, f0) of each donor, then of the mean."""
        n = len(at.x)
        of_donors = [(x0, self.sae.encode(x0)) for x0 in self.donors.x(at.pair, n)]
        return [*of_donors, (self.x_mean.expand(n, -1), self.f_mean.expand(n, -1))]


def keep(baseline: AblationBaseline, order: Int[Array, "units width"], grid: Sequence[int]) -> Replacement:
    """One variant per base (the donors, then the mean) and K of the grid (ascending); the K of a base are adjacent. A unit
    of the order is a feature, or the two features of a principal component, one per sign."""

    def replace(at: Span) -> Tensor:
        sae, out = baseline.sae, []
        f = sae.encode(at.x)
        for x0, f0 in baseline.bases(at):
            x, done = x0.clone(), 0
            for k in grid:
                features = torch.from_numpy(order[done:k].reshape(-1))
                if features.numel():
                    x = x + (f - f0)[:, features] @ sae.W_dec[features]
                out.append(x)
                done = k
        return torch.stack(out)

    return replace


def error_alone(baseline: AblationBaseline) -> Replacement:
    """One variant per base: the features of the donor (or their mean), the error as it is."""

    def replace(at: Span) -> Tensor:
        e = at.x - baseline.sae(at.x)
        return torch.stack([baseline.sae.decode(f0) + e for _, f0 in baseline.bases(at)])

    return replace


def feature_sum(sae: Sae, x: Float[Tensor, "span d"], features: Int[Array, " k"]) -> Float[Tensor, "span d"]:
    """Σ_j f_tj d_j over the features: what their ablation takes out of the stream."""
    j = torch.from_numpy(np.asarray(features).reshape(-1))
    return sae.encode(x)[:, j] @ sae.W_dec[j]


def ablate(sae: Sae, lists: Sequence[Sequence[Int[Array, " _"]]]) -> Replacement:
    """One variant per list and set of features, the sets of a list adjacent: the stream without the set's features."""
    return lambda at: torch.stack([at.x - feature_sum(sae, at.x, set_) for sets in lists for set_ in sets])


def norm_matched_moves(sae: Sae, donors: Donors, sets: Sequence[Int[Array, " _"]]) -> Replacement:
    """One variant per set: x moved along the difference of two donors' streams, as far as ablating the set moves it."""

    def replace(at: Span) -> Tensor:
        a, b, *_ = donors.x(at.pair, len(at.x))
        direction = torch.nn.functional.normalize(a - b, dim=1)
        return torch.stack([at.x + feature_sum(sae, at.x, s).norm(dim=1, keepdim=True) * direction for s in sets])

    return replace


@dataclass(frozen=True, slots=True)
class KeepPoint:
    """Keep K at one K: delta_r2 of the mean Δr^ over donors, with the dataset's mean instead of donors, and with a single
    donor at a time; agreement is that of the mean Δr^ over donors."""

    k: int
    donors: Figure
    mean: Figure
    agreement: Figure
    single: float


def keep_curve(rows: ReplacedRewards, grid: Sequence[int], prompts: Array) -> list[KeepPoint]:
    """The curve of what :func:`keep` replaced, one point per K of the grid."""
    delta, points = rows.delta, []
    for k, hat in zip(grid, np.moveaxis(rows.delta_hat.reshape(len(delta), -1, len(grid)), 2, 0), strict=True):
        donors, averaged = hat[:, :-1], hat[:, :-1].mean(1)
        single = float(1 - ((delta[:, None] - donors) ** 2).mean(1).sum() / (delta**2).sum())
        of_donors, of_mean = delta_r2(delta, averaged, prompts), delta_r2(delta, hat[:, -1], prompts)
        points.append(KeepPoint(k, of_donors, of_mean, agreement(delta, averaged, prompts), single))
    return points


def smallest_k(points: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The smallest K of the grid whose delta_r2 reaches the threshold; None where none does."""
    return next((k for k, value in points if value >= threshold), None)


def lost_share(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """The share of Δr that is lost: 1 - Σ Δr Δr^ / Σ Δr²; 0 where nothing changes, 1 where nothing is left."""
    return one_minus(delta * delta_hat, delta**2, prompts)


@dataclass(frozen=True)
class SelectSplit:
    """The pairs that a store was harvested from, in its order, and which of them belong to the select split."""

    store: ActivationStore
    tokens: Sequence[PairTokens]
    prompts: Sequence[str]
    pairs: Sequence[int]


class FrozenSelection:
    """All that is frozen at a site on the select split: orders, flags, means, donors, control dictionaries."""

    def __init__(
        self, rm: RewardModel, site: str, sae: Sae, select: SelectSplit, prompts: Sequence[str], progress: Progress = silent
    ) -> None:
        """``prompts`` names the prompt of each pair that will be measured: donors never share it.

        1. Stored responses give means, firing rates and flags.
        2. They also give the control dictionaries, which have as many active units on a token as the SAE.
        3. Contributions on select pairs put the units of each dictionary in order.
        4. Donors and means become the baselines.
        """
        self.rm, self.site, self.sae, tokens, d = rm, site, sae, select.tokens, sae.d
        responses = Responses(select.store, site, set(select.pairs))

        def ending(pair: int, side: str) -> int:
            ids = tokens[pair].side(side)
            return rm.ending(ids[: rm.read_position(ids) + 1]) - tokens[pair].divergence

        self.profile = p = selection.profile(sae, responses, ending)

        x = responses.sample(PCA_TOKENS)
        basis = selection.principal_components(x)
        l0 = max(1, round(float((sae.encode(x[:4096]) > 0).sum(1).float().mean())))
        self.sparse_pca = selection.signed_basis(basis, p.x_mean, l0)
        self.random = selection.random_dictionary(x, sae.m, l0)
        bases = {"keep_pca": basis, "keep_coordinates": torch.eye(d)}
        complete = {name: selection.signed_basis(rows, p.x_mean) for name, rows in bases.items()}

        selected = [tokens[i] for i in select.pairs[:SELECT_PAIRS]]
        dictionaries = {"keep": (sae, p.f_mean)} | {name: (one, one.encode(x).mean(0)) for name, one in complete.items()}
        D, delta = selection.differences(rm, dictionaries, site, selected, p.x_mean, progress=progress)
        lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in selected], dtype=float)
        self.length_slope = slope(delta, lengths)
        self.flagged = p.dense | p.ending | selection.length_flags(D["keep"], lengths)
        order = selection.forward_order(D["keep"], delta)
        self.order = order[:, None]

        self.donors = Donors(responses, select.prompts, prompts)
        self.baseline = AblationBaseline(sae, self.donors, p.f_mean, p.x_mean)
        unflagged = order[~self.flagged[order]][:, None]
        self.lists = {"keep": (self.baseline, self.order), "unflagged": (self.baseline, unflagged)}
        """By their curve of keep K: what replaces the rest, and the units in order."""
        for name in complete:
            units = selection.signed_units(d)[selection.forward_order(D[name][:, :d] + D[name][:, d:], delta)]
            self.lists[name] = (AblationBaseline(dictionaries[name][0], self.donors, dictionaries[name][1], p.x_mean), units)

    @property
    def ablate_grid(self) -> list[int]:
        """The K at which the list is ablated: those of ABLATE_GRID that leave as many features to match."""
        return [k for k in ABLATE_GRID if 2 * k <= self.sae.m]

    def ablation_sets(self) -> list[list[Array]]:
        """The list's top K, then MATCHED_DRAWS draws of matched features, at each K of :attr:`ablate_grid`."""
        top = self.order[: self.ablate_grid[-1], 0]
        draws = [selection.matched_controls(self.profile, top, seed) for seed in range(MATCHED_DRAWS)]
        return [[features[:k] for k in self.ablate_grid] for features in (top, *draws)]


@dataclass(frozen=True, slots=True)
class AblatePoint:
    """Ablate K at one K: the share of Δr that is lost without the list's top K, without K matched features (the mean over
    draws), and by a move of the same norm along differences of real activations."""

    k: int
    list: Figure
    matched: Figure
    norm: Figure


@dataclass(frozen=True)
class Explained:
    """How much of Δr a site explains. Every figure is a delta_r2 or a share; intervals are 95 %, bootstrap by prompt."""

    site: str
    evaluation: Evaluation
    """The splice, sparsity and reconstruction of the SAE."""
    controls: dict[str, Figure]
    """delta_r2 of pca, random, noise (each spliced), length (alone), error and error_mean (the error alone)."""
    flagged: int
    """Flagged features of the SAE, and (``flagged_of_64``) those among the first 64 of the list."""
    flagged_of_64: int
    curves: dict[str, list[KeepPoint]]
    """Keep K: keep (the list), unflagged (the list without flagged features), keep_pca, keep_coordinates."""
    ablated: list[AblatePoint]
    pairs: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, as ``explained.json`` stores it."""
        plain = asdict(self)
        return plain | {"evaluation": plain["evaluation"]["figures"] | {"dead": self.evaluation.dead}}


def explain(
    frozen: FrozenSelection, tokens: Sequence[PairTokens], prompts: Sequence[str], progress: Progress = silent
) -> Explained:
    """Every figure of the site of ``frozen`` on the given pairs; ``prompts`` names the prompt of each pair."""
    s, groups, sets = frozen, np.array(prompts), frozen.ablation_sets()
    full = (*(k for k in GRID if k < s.sae.m), s.sae.m)
    grids = {name: full if name == "keep" else COARSE_GRID for name in s.lists}
    replacements = {
        "pca": splice(s.sparse_pca),
        "random": splice(s.random),
        "noise": selection.noise(s.sae),
        "error": error_alone(s.baseline),
        "ablate": ablate(s.sae, sets),
        "norm": norm_matched_moves(s.sae, s.donors, sets[0]),
    } | {name: keep(baseline, order, grids[name]) for name, (baseline, order) in s.lists.items()}
    at_site = {name: (s.site, replacement) for name, replacement in replacements.items()}
    rows = run_replacements(s.rm, tokens, range(len(tokens)), at_site, progress)

    delta, error = rows["keep"].delta, rows["error"].delta_hat
    lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in tokens], dtype=float)
    alone = {name: rows[name].delta_hat[:, 0] for name in ("pca", "random", "noise")}
    alone |= {"length": s.length_slope * lengths, "error": error[:, :-1].mean(1), "error_mean": error[:, -1]}
    ablated = rows["ablate"].delta_hat.reshape(len(delta), len(sets), -1)
    ablations = (ablated[:, 0], ablated[:, 1:].mean(1), rows["norm"].delta_hat)
    (evaluation,) = evaluate(s.rm, {s.site: s.sae}, tokens, list(prompts))
    return Explained(
        site=s.site,
        evaluation=evaluation,
        controls={name: delta_r2(delta, hat, groups) for name, hat in alone.items()},
        flagged=int(s.flagged.sum()),
        flagged_of_64=int(s.flagged[s.order[:64, 0]].sum()),
        curves={name: keep_curve(rows[name], grid, groups) for name, grid in grids.items()},
        ablated=[
            AblatePoint(k, *(lost_share(delta, hat[:, i], groups) for hat in ablations)) for i, k in enumerate(s.ablate_grid)
        ],
        pairs=len(tokens),
        prompts=len(np.unique(groups)),
    )
