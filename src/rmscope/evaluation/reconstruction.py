"""How good SAEs are, side by side on the same held-out pairs: sparsity, reconstruction, and the reward that survives.

Sparsity and reconstruction are measured over every token of the pairs but position 0; a shared prompt counts once. The
reward figures replace the stream on the span (:mod:`rmscope.effects.splice`). FVU is centred per dimension and summed over
dimensions. Intervals are 95 %, bootstrap by prompt. ``dead`` has no interval: it is the share of features that stay silent
on these tokens, and it falls with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.splice import (
    Span,
    agreement,
    clean_runs,
    cross_scaled,
    delta_r2,
    reward_recovered,
    rewards_on_span,
    splice,
)
from rmscope.io import Progress, silent
from rmscope.model.clean_run import CleanRun
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, ratio

FIGURES = (
    "l0", "fvu", "cosine", "norm_ratio", "reward_recovered", "delta_r2", "delta_r2_scaled", "agreement",
)  # fmt: skip
"""Each has an interval. ``l0`` counts active features per token, ``cosine`` is that of x and x^, ``norm_ratio`` is
E|x^| / E|x|. The last four are measured under splice, ``delta_r2_scaled`` after one slope fitted on the other half of the
prompts."""
SUMS = ("tokens", "l0", "error", "variance", "cosine", "norm", "norm_hat")


@dataclass(frozen=True)
class Evaluation:
    """One SAE on the pairs."""

    name: str
    site: str
    architecture: str
    m: int
    tokens: int
    figures: dict[str, Figure]
    """By the names in :data:`FIGURES`."""
    density: Float[Array, " m"]
    """Share of tokens on which each feature fires."""
    delta: Float[Array, " pairs"]
    """Δr, in units of reward."""
    delta_hat: Float[Array, " pairs"]
    """Δr under splice."""

    @property
    def dead(self) -> float:
        """Share of features that never fire on these tokens."""
        return float((self.density == 0).mean())

    def row(self) -> dict[str, float | int | str | None]:
        """One flat row: each figure in three columns, its name, ``_low`` and ``_high``."""
        flat: dict[str, float | int | str | None] = {
            "sae": self.name, "site": self.site, "architecture": self.architecture, "d_sae": self.m,
            "pairs": len(self.delta), "tokens": self.tokens, "dead": self.dead,
        }  # fmt: skip
        for name, f in self.figures.items():
            flat |= {name: f.value, f"{name}_low": f.low, f"{name}_high": f.high}
        return flat


def evaluate(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    prompts: Sequence[str],
    progress: Progress = silent,
) -> list[Evaluation]:
    """Evaluates every SAE on the same pairs.

    Args:
        saes: by name; each is evaluated at its own ``site``.
        prompts: the prompt of each pair; the bootstrap resamples them.
    """
    sites = sorted({sae.site for sae in saes.values()}, key=rm.site_index)
    centre, span_mean = _means(rm, tokens, sites)
    for sae in saes.values():
        sae.encode_on(rm.device)
    sums = {name: np.zeros((len(tokens), len(SUMS))) for name in saes}
    fires = {name: torch.zeros(sae.m, dtype=torch.int64) for name, sae in saes.items()}
    clean = np.zeros((len(tokens), 2))
    rewards = {name: np.zeros((len(tokens), 2, 2)) for name in saes}
    for i, t in enumerate(tokens):
        texts = clean_runs(rm, t, sites)
        clean[i] = [texts[side].reward for side in SIDES]
        for name, sae in saes.items():
            x = _every_token(rm, texts, t, sae.site)
            sums[name][i] = _sums(sae, x, centre[sae.site], fires[name])
            for s, side in enumerate(SIDES):
                on_span = texts[side].streams[sae.site][t.divergence :].float().cpu()
                ablated = span_mean[sae.site].expand_as(on_span)[None]
                streams = torch.cat([splice(sae)(Span(i, side, on_span)), ablated])
                rewards[name][i, s] = rewards_on_span(rm, texts[side], sae.site, t.divergence, streams).double().numpy()
        progress(i + 1, len(tokens), "pairs evaluated")
    groups = np.asarray(prompts)
    return [_evaluation(name, sae, sums[name], fires[name], clean, rewards[name], groups) for name, sae in saes.items()]


def first_counted(rm: RewardModel, t: PairTokens, side: str) -> int:
    """The first token that counts: the shared prefix counts once where its stream is the same on both sides."""
    return max(1, t.shared) if side == "rejected" and rm.causal else 1


def _every_token(rm: RewardModel, texts: Mapping[str, CleanRun], t: PairTokens, site: str) -> Float[Tensor, "tokens d"]:
    return torch.cat([texts[side].streams[site][first_counted(rm, t, side) :] for side in SIDES]).float().cpu()


def _means(
    rm: RewardModel, tokens: Sequence[PairTokens], sites: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per site the means of x [d] over all tokens but position 0, and over the spans."""
    every, spans = ({site: torch.zeros(rm.d_model).double() for site in sites} for _ in range(2))
    n_every = n_spans = 0
    for batch in rm.batches(tokens):
        streams = rm.streams(batch, sites)
        for text in batch.texts:
            columns = text.columns[first_counted(rm, tokens[text.pair], text.side) : text.read + 1]
            n_every, n_spans = n_every + columns.numel(), n_spans + text.span.numel()
            for site, x in streams.items():
                every[site] += x[text.row, columns.to(x.device)].double().sum(0).cpu()
                spans[site] += x[text.row, text.span.to(x.device)].double().sum(0).cpu()
    return (
        {site: (x / max(1, n_every)).float() for site, x in every.items()},
        {site: (x / max(1, n_spans)).float() for site, x in spans.items()},
    )


def _sums(sae: Sae, x: Float[Tensor, "tokens d"], centre: Float[Tensor, " d"], fires: Tensor) -> list[float]:
    """The sums of a pair from which the figures are ratios, in the order of :data:`SUMS`; adds its firings to ``fires``."""
    active = sae.active(x)
    fires += torch.bincount(active.feature, minlength=sae.m)
    y, y_hat = x.double(), sae.decode_active(active).double()
    parts = [
        (y - y_hat).square().sum(), (y - centre.double()).square().sum(), torch.cosine_similarity(y, y_hat, dim=1).sum(),
        y.norm(dim=1).sum(), y_hat.norm(dim=1).sum(),
    ]  # fmt: skip
    return [float(len(x)), float(active.value.numel()), *map(float, parts)]


def _evaluation(name: str, sae: Sae, sums: Array, fires: Tensor, clean: Array, rewards: Array, prompts: Array) -> Evaluation:
    part = dict(zip(SUMS, sums.T, strict=True))
    delta = clean[:, 0] - clean[:, 1]
    delta_hat = rewards[:, 0, 0] - rewards[:, 1, 0]
    figures = {
        "l0": ratio(part["l0"], part["tokens"], prompts),
        "fvu": ratio(part["error"], part["variance"], prompts),
        "cosine": ratio(part["cosine"], part["tokens"], prompts),
        "norm_ratio": ratio(part["norm_hat"], part["norm"], prompts),
        "reward_recovered": reward_recovered(clean, rewards[..., 0], rewards[..., 1], prompts),
        "delta_r2": delta_r2(delta, delta_hat, prompts),
        "delta_r2_scaled": delta_r2(delta, cross_scaled(delta, delta_hat, prompts), prompts),
        "agreement": agreement(delta, delta_hat, prompts),
    }
    n = int(part["tokens"].sum())
    density = fires.double().numpy() / max(1, n)
    return Evaluation(name, sae.site, sae.architecture, sae.m, n, figures, density, delta, delta_hat)


def as_table(evaluations: Sequence[Evaluation]) -> pl.DataFrame:
    """One row per SAE."""
    return pl.DataFrame([e.row() for e in evaluations])
