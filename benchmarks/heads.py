"""Final states of pairs, clean and spliced: delta_r2 of an SAE under any score head, from one pass.

A head reads w · h at the read position, so Δr = w · (h chosen - h rejected) for every w at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rmscope.evaluation.reward_aware import on_spans
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.recipe import data_file
from rmscope.pairs.pair import Pair
from rmscope.pairs.readers import load_pairs
from rmscope.sae import Sae
from rmscope.statistics import Array, Figure, interval

HELD_OUT = 500
"""Rows of each hh-rlhf file that the zoo's adapters were not trained on."""
LONGEST = 384
"""Tokens of a side; longer pairs are left out to save time."""


def helpful_pairs(rm: RewardModel, first: int, last: int) -> list[Pair]:
    """Rows ``first`` .. ``last`` of hh-rlhf helpful-base (test), those of at most LONGEST tokens a side."""
    pairs = [p for p in load_pairs(data_file("hh-rlhf/helpful-base/test.jsonl.gz"), limit=last) if p.meta["line"] >= first]
    lengths = [max(t.chosen.numel(), t.rejected.numel()) for t in rm.tokenize_all(pairs)]
    return [p for p, n in zip(pairs, lengths, strict=True) if n <= LONGEST and p.chosen != p.rejected]


@torch.no_grad()
def states(rm: RewardModel, tokens: Sequence[PairTokens], sae: Sae | None = None) -> Array:
    """h chosen - h rejected of every pair, [pairs, d], with x replaced by x^ on the spans where an SAE is given."""
    out, read = torch.zeros(len(tokens), rm.d_model), list[torch.Tensor]()
    handle = rm.model.score.register_forward_pre_hook(lambda _module, given: read.append(given[0]))
    try:
        for batch in rm.batches(tokens):
            if sae is None:
                rm.rewards(batch)
            else:
                stream = rm.streams(batch, [sae.site])[sae.site]
                rm.rewards_from(batch, sae.site, on_spans(batch, stream, lambda x: sae.decode_active(sae.active(x))))
            for text, h in zip(batch.texts, read.pop(), strict=True):
                out[text.pair] += h if text.side == "chosen" else -h
    finally:
        handle.remove()
    return out.double().numpy()


def fit_head(z: Array, labels: Array, decay: float = 0.01) -> Array:
    """w [d] by logistic regression of labels (+1 / -1) on z [n, d], without a constant, with weight decay."""
    size = float(np.sqrt((z**2).mean()))
    x, y = torch.from_numpy(z / size), torch.from_numpy(labels)
    w = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.softplus(-y * (x @ w)).mean() + decay / 2 * w.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return w.detach().numpy() / size


def delta_r2(clean: Array, spliced: Array, w: Array, prompts: Array) -> Figure:
    """1 - Σ(Δr - Δr^)² / Σ Δr² with its interval, bootstrap by prompt."""
    errors = np.stack([((clean - spliced) @ w) ** 2, (clean @ w) ** 2], axis=1)
    return interval(errors, prompts, lambda v: float(1 - v[:, 0].sum() / v[:, 1].sum()))


def gain(clean: Array, before: Array, after: Array, w: Array, prompts: Array) -> Figure:
    """delta_r2 after minus before on the same pairs, with the interval of the paired difference."""
    errors = np.stack([((clean - before) @ w) ** 2, ((clean - after) @ w) ** 2, (clean @ w) ** 2], axis=1)
    return interval(errors, prompts, lambda v: float((v[:, 0].sum() - v[:, 1].sum()) / v[:, 2].sum()))


def as_cell(figure: Figure, signed: bool = False) -> str:
    """A figure with its interval, for a table."""
    value, low, high = (format(v, "+.3f" if signed else ".3f") for v in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
