"""How much of the reward difference preference training wrote before each block, and where it still is.

At block L the stream on the span is set to the base's own: δ := 0. The part of Δr that goes with it was written before L;
the rest is read off the base later. With δ := 0 on all tokens but those of the response's ending, only the part goes that is
still at the tokens that caused it. It grows while blocks write, and shrinks while attention carries it to the token that is
read: the sites between are the ones to study. As shares of Δr over pairs,

    share = Σ Δr (Δr - Δr without) / Σ Δr²
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import DIFF

WRITTEN_PAIRS = 24
"""Pairs on which the blocks are compared."""
AT_THE_ENDING = 0.05
"""What a share of Δr that was carried to the ending counts, beside one at its own tokens."""


@dataclass(frozen=True, slots=True)
class WrittenShare:
    """What was written up to the end of a block, as shares of Δr."""

    block: int
    written: float
    at_own_tokens: float
    """Of Δr too: the part that is still at other tokens than the response's ending."""

    @property
    def priority(self) -> float:
        """How much there is to study: at the response's ending, what was written can hardly be told apart."""
        return self.at_own_tokens + AT_THE_ENDING * self.written


@torch.no_grad()
def written_shares(rm: RewardModel, tokens: Sequence[PairTokens]) -> list[WrittenShare]:
    """One row per block from the first trained one on. Needs the PM's base."""
    assert rm.base is not None
    blocks = list(range(rm.base.first, len(rm.blocks)))
    sites = [f"{DIFF}.{block}" for block in blocks]
    clean = torch.zeros(len(tokens), dtype=torch.float64)
    without = torch.zeros(len(blocks), 2, len(tokens), dtype=torch.float64)
    for batch in rm.batches(tokens):
        streams = rm.streams(batch, sites)
        sign = torch.tensor([1.0 if t.side == "chosen" else -1.0 for t in batch.texts], dtype=torch.float64)
        pair = torch.tensor([t.pair for t in batch.texts])
        clean.index_add_(0, pair, sign * rm.rewards(batch).double().cpu())
        for i, site in enumerate(sites):
            for kind in (0, 1):
                ablated = streams[site].clone()
                for text in batch.texts:
                    ids = tokens[text.pair].side(text.side)[: text.read + 1]
                    end = max(text.divergence, rm.ending(ids)) if kind else text.read + 1
                    ablated[text.row, text.columns[text.divergence : end].to(ablated.device)] = 0
                without[i, kind].index_add_(0, pair, sign * rm.rewards_from(batch, site, ablated).double().cpu())
    total = float(clean @ clean) or 1.0
    shares = ((clean - without) @ clean / total).tolist()
    return [WrittenShare(block, written, own) for block, (written, own) in zip(blocks, shares, strict=True)]
