"""The stream on the span replaced by something else, and how much of the reward difference survives it.

One primitive, :func:`rewards_on_span`: the stream of one text at a site, from the divergence to the read position,
becomes a given tensor, and the model runs on. *Splice* (METHOD, "Explained") puts x^ = decode(encode(x)) there; keep K,
ablate K and every control are other tensors (``explained.py``). A pair's prompt runs once, its sides fork its keys and
values, and the variants of a text share a batch that starts at the site and at the divergence.

From the clean Δr and the replaced Δr^ of a set of pairs:

    delta_r2          1 - Σ(Δr - Δr^)² / Σ Δr²        uncentred: the same whichever side is called chosen
    agreement         share of pairs with sign Δr^ = sign Δr
    reward_recovered  1 - Σ|r - r^| / Σ|r - r_mean|   over responses; r_mean with the stream's mean on the span

The last is "loss recovered" (SAELens, Gao et al. 2024, section 4.1) with the change of the reward in the place of the
loss: 1 where the splice moves no reward, 0 where it does the damage of mean ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import BATCH_TOKENS, prefill_pair
from rmscope.io import Progress, silent
from rmscope.model.clean_run import CleanRun
from rmscope.model.packing import Batch, pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.statistics import Array, Figure, one_minus


@dataclass(frozen=True, slots=True)
class Span:
    """One response at one site: the stream x on its span, float32 on the CPU."""

    pair: int
    side: str
    x: Float[Tensor, "span d"]


Replacement = Callable[[Span], Float[Tensor, "variants span d"]]
"""What the stream on the span becomes; always the same number of variants."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """Rewards of both sides (chosen, rejected), as they are and with each variant in the stream's place."""

    clean: Float[Array, "pairs 2"]
    rewards: Float[Array, "pairs 2 variants"]

    @property
    def delta(self) -> Float[Array, " pairs"]:
        """Δr."""
        return self.clean[:, 0] - self.clean[:, 1]

    @property
    def delta_hat(self) -> Float[Array, "pairs variants"]:
        """Δr^ of each variant."""
        return self.rewards[:, 0] - self.rewards[:, 1]


def clean_runs(rm: RewardModel, tokens: PairTokens, sites: Sequence[str]) -> dict[str, CleanRun]:
    """Both sides of a pair up to their read positions, with the stream at each site; without keys where the PM cannot be
    resumed (encoders, and decoders that refuse a cache)."""
    if rm.capabilities.resume:
        return prefill_pair(rm, tokens, sites)
    out: dict[str, CleanRun] = {}
    for side in SIDES:
        ids = tokens.side(side)
        ids = ids[: rm.read_position(ids) + 1] if rm.causal else ids
        batch = _rows(ids, 1)
        streams = {site: x[0] for site, x in rm.streams(batch, sites).items()}
        out[side] = CleanRun(ids, streams, [], float(rm.rewards(batch)[0]))
    return out


def _rows(ids: Tensor, n: int) -> Batch:
    return pad_texts([(0, "chosen", ids, 1, ids.numel() - 1)] * n, 0)


@torch.no_grad()
def rewards_on_span(
    rm: RewardModel, text: CleanRun, site: str, start: int, streams: Float[Tensor, "variants span d"]
) -> Float[Tensor, " variants"]:
    """r of a text with its stream at ``site`` replaced from token ``start`` to the read position, variant by variant.

    Nothing before ``start`` and no block up to the site runs again; a PM that cannot be resumed runs whole, with an edit.
    """
    if streams.shape[1] == 0:
        return torch.full((len(streams),), text.reward)
    found = []
    for part in streams.split(max(1, BATCH_TOKENS // (streams.shape[1] if text.keys else text.ids.numel()))):
        if text.keys:
            found.append(rm.resume(text, site, start, part.to(rm.device)).float().cpu())
            continue

        def edit(stream: Tensor, part: Tensor = part) -> Tensor:
            edited = stream.clone()
            edited[:, start:] = part.to(stream)
            return edited

        found.append(rm.rewards(_rows(text.ids, len(part)), {site: edit}).float().cpu())
    return torch.cat(found)


def replaced(
    rm: RewardModel,
    tokens: Sequence[PairTokens],
    pairs: Sequence[int],
    replacements: Mapping[str, tuple[str, Replacement]],
    progress: Progress = silent,
) -> dict[str, Replaced]:
    """Rewards of ``pairs`` (indices into ``tokens``, in their order) under each named (site, replacement)."""
    sites = sorted({site for site, _ in replacements.values()}, key=rm.site_index)
    clean, found = [], {name: list[list[Array]]() for name in replacements}
    for done, pair in enumerate(pairs, 1):
        texts, start = clean_runs(rm, tokens[pair], sites), tokens[pair].divergence
        clean.append([texts[side].reward for side in SIDES])
        for name, (site, replace) in replacements.items():
            sides = []
            for side in SIDES:
                x = texts[side].streams[site][start:].float().cpu()
                streams = replace(Span(pair, side, x))
                sides.append(rewards_on_span(rm, texts[side], site, start, streams).double().numpy())
            found[name].append(sides)
        progress(done, len(pairs), "pairs spliced")
    return {name: Replaced(np.array(clean), np.array(rows)) for name, rows in found.items()}


def splice(sae: Sae) -> Replacement:
    """x^ alone."""
    return lambda at: sae.decode_active(sae.active(at.x))[None]


def constant(value: Float[Tensor, " d"]) -> Replacement:
    """The same vector at every token of the span: mean ablation, with the mean."""
    return lambda at: value.expand_as(at.x)[None]


# Figures


def delta_r2(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """1 - Σ(Δr - Δr^)² / Σ Δr²."""
    return one_minus((delta - delta_hat) ** 2, delta**2, prompts)


def slope(delta: Array, delta_hat: Array) -> float:
    """The least-squares s of Δr = s Δr^; to be fitted on pairs other than those that it is used on."""
    total = float(delta_hat @ delta_hat)
    return float(delta @ delta_hat) / total if total else 0.0


def cross_scaled(delta: Array, delta_hat: Array, prompts: Array) -> Array:
    """Δr^ times a slope fitted on the other half of the prompts."""
    half = np.unique(prompts, return_inverse=True)[1] % 2
    out = np.empty_like(delta_hat)
    for side in (0, 1):
        out[half == side] = delta_hat[half == side] * slope(delta[half != side], delta_hat[half != side])
    return out


def agreement(delta: Array, delta_hat: Array, prompts: Array) -> Figure:
    """Share of pairs with sign Δr^ = sign Δr."""
    return one_minus((np.sign(delta) != np.sign(delta_hat)).astype(float), np.ones_like(delta), prompts)


def reward_recovered(clean: Array, spliced: Array, ablated: Array, prompts: Array) -> Figure:
    """1 - Σ|r - r^| / Σ|r - r_mean| over both sides, each [pairs, 2]."""
    return one_minus(np.abs(clean - spliced).sum(1), np.abs(clean - ablated).sum(1), prompts)
