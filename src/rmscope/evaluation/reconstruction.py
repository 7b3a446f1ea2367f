"""How good SAEs are, side by side on the same held-out pairs: sparsity, reconstruction, and the reward that survives.

Sparsity and reconstruction are measured over every token of the pairs but position 0; a shared prompt counts once. The
reward figures replace the stream on the span (:mod:`rmscope.effects.splice`). FVU is centred per dimension and summed over
dimensions. Intervals are 95 %, bootstrap by prompt. ``dead`` has no interval: it is the share of features that stay silent
on these tokens, and it falls with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import clean_runs, rewards_on_span
from rmscope.effects.splice import Span, agreement, constant, cross_scaled, delta_r2, reward_recovered, splice
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import parts_of
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, ratio


@dataclass(frozen=True)
class Evaluation:
    """One SAE on the pairs."""

    name: str
    site: str
    architecture: str
    m: int
    tokens: int
    figures: dict[str, Figure]
    """l0 (active features per token), fvu, cosine (of x and x^), norm_ratio (E|x^| / E|x|), and under splice
    reward_recovered, delta_r2, delta_r2_scaled (after one slope fitted on the other half of the prompts), agreement."""
    density: Float[Array, " m"]
    """Share of tokens on which each feature fires."""
    delta: Float[Array, " pairs"]
    """Δr, in units of reward; ``delta_hat`` is the same under splice."""
    delta_hat: Float[Array, " pairs"]

    @property
    def dead(self) -> float:
        """Share of features that never fire on these tokens."""
        return float((self.density == 0).mean())


def evaluate(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    prompts: Sequence[str],
    progress: Progress = silent,
) -> list[Evaluation]:
    """Evaluates every SAE (by name), at its own ``site``, on the same pairs; the bootstrap resamples their prompts."""
    sites = sorted({sae.site for sae in saes.values()}, key=rm.site_index)
    means = _means(rm, tokens, sites)
    for sae in saes.values():
        sae.encode_on(rm.device)
    fires = {name: torch.zeros(sae.m, dtype=torch.int64) for name, sae in saes.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in saes}
    for i, t in enumerate(tokens):
        texts = clean_runs(rm, t, sites)
        clean = [texts[side].reward for side in SIDES]
        for name, sae in saes.items():
            centre, span_mean = means[sae.site]
            every = {side: texts[side].streams[sae.site].float().cpu() for side in SIDES}
            counted = torch.cat([every[side][first_counted(rm, t, side) :] for side in SIDES])
            rewards = []
            for side in SIDES:
                at = Span(i, side, every[side][t.divergence :])
                streams = torch.cat([splice(sae)(at), constant(span_mean)(at)])
                rewards.append(rewards_on_span(rm, texts[side], sae.site, t.divergence, streams).double().tolist())
            spliced, ablated = zip(*rewards, strict=True)
            row = {"clean": clean, "spliced": spliced, "ablated": ablated}
            rows[name].append(row | _sums(sae, counted, centre, fires[name]))
        progress(i + 1, len(tokens), "pairs evaluated")
    return [_evaluation(name, sae, rows[name], fires[name], np.asarray(prompts)) for name, sae in saes.items()]


def first_counted(rm: RewardModel, t: PairTokens, side: str) -> int:
    """The first token that counts: the shared prefix counts once where its stream is the same on both sides."""
    return max(1, t.shared) if side == "rejected" and rm.causal else 1


def _means(rm: RewardModel, tokens: Sequence[PairTokens], sites: Sequence[str]) -> dict[str, Float[Tensor, "2 d"]]:
    """Per site the means of x over all tokens but position 0, and over the spans."""
    totals = {site: torch.zeros(2, rm.d_model * len(parts_of(site)), dtype=torch.float64) for site in sites}
    counts = torch.zeros(2, 1, dtype=torch.float64)
    for batch in rm.batches(tokens):
        streams = rm.streams(batch, sites)
        for text in batch.texts:
            every = text.columns[first_counted(rm, tokens[text.pair], text.side) : text.read + 1]
            for k, columns in enumerate((every, text.span)):
                counts[k] += columns.numel()
                for site, x in streams.items():
                    totals[site][k] += x[text.row, columns.to(x.device)].double().sum(0).cpu()
    return {site: (total / counts.clamp(min=1)).float() for site, total in totals.items()}


def _sums(sae: Sae, x: Float[Tensor, "tokens d"], centre: Float[Tensor, " d"], fires: Tensor) -> dict[str, float]:
    """The sums of a pair from which the figures are ratios; adds its firings to ``fires``."""
    active = sae.active(x)
    fires += torch.bincount(active.feature, minlength=sae.m)
    y, y_hat = x.double(), sae.decode_active(active).double()
    return {
        "tokens": float(len(x)), "l0": float(active.value.numel()), "error": float((y - y_hat).square().sum()),
        "variance": float((y - centre.double()).square().sum()), "norm": float(y.norm(dim=1).sum()),
        "cosine": float(torch.cosine_similarity(y, y_hat, dim=1).sum()), "norm_hat": float(y_hat.norm(dim=1).sum()),
    }  # fmt: skip


def _evaluation(name: str, sae: Sae, rows: Sequence[dict[str, Any]], fires: Tensor, prompts: Array) -> Evaluation:
    part = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    delta, delta_hat = (part[key][:, 0] - part[key][:, 1] for key in ("clean", "spliced"))
    figures = {
        "l0": ratio(part["l0"], part["tokens"], prompts),
        "fvu": ratio(part["error"], part["variance"], prompts),
        "cosine": ratio(part["cosine"], part["tokens"], prompts),
        "norm_ratio": ratio(part["norm_hat"], part["norm"], prompts),
        "reward_recovered": reward_recovered(part["clean"], part["spliced"], part["ablated"], prompts),
        "delta_r2": delta_r2(delta, delta_hat, prompts),
        "delta_r2_scaled": delta_r2(delta, cross_scaled(delta, delta_hat, prompts), prompts),
        "agreement": agreement(delta, delta_hat, prompts),
    }
    n = int(part["tokens"].sum())
    density = fires.double().numpy() / max(1, n)
    return Evaluation(name, sae.site, sae.architecture, sae.m, n, figures, density, delta, delta_hat)


def as_table(evaluations: Sequence[Evaluation]) -> pl.DataFrame:
    """One row per SAE: each figure in three columns, its name, ``_low`` and ``_high``."""
    rows: list[dict[str, object]] = []
    for e in evaluations:
        row = {"sae": e.name, "site": e.site, "architecture": e.architecture, "d_sae": e.m, "pairs": len(e.delta)}
        rows.append(row | {"tokens": e.tokens, "dead": e.dead})
        for name, f in e.figures.items():
            rows[-1] |= {name: f.value, f"{name}_low": f.low, f"{name}_high": f.high}
    return pl.DataFrame(rows)
