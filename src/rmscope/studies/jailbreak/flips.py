"""The token-level pass: single tokens of the phrases are replaced where that raises the exact mean reward.

The reward's gradient at the embedding proposes replacements (HotFlip; Ebrahimi et al. 2018, arXiv 1712.06751). Each is
scored exactly, as the whole text tokenised again, before it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rmscope.effects.gradients import streams_and_gradients
from rmscope.model.reward_model import RewardModel
from rmscope.statistics import Array
from rmscope.studies.jailbreak.phrases import Phrase, count_tokens
from rmscope.studies.jailbreak.placement import Layout
from rmscope.studies.jailbreak.scorer import SCREEN, Scorer

FLIPS = 32
"""Replacements that are tried."""
FLIPS_PER_TOKEN = 2
"""At most so many of them at one token."""
FLIPS_CHECKED = 6
"""The best of them are tried on all targets."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A replacement of one token: the phrase's place in the list, the token's place in the phrase, the new phrase."""

    at: int
    token: int
    phrase: Phrase

    def apply(self, layout: Layout) -> Layout:
        """The list with the new phrase."""
        return tuple(replace(p, phrase=self.phrase) if i == self.at else p for i, p in enumerate(layout))


def flip_tokens(scorer: Scorer, layout: Layout, rewards: Float[Array, " targets"]) -> Layout:
    """One pass, at most one token per phrase. ``rewards`` are those of the list as it is."""
    if not layout or not (proposed := propose_flips(scorer, layout)):
        return layout
    scorer.move_to(layout)
    means = scorer.rewards([f.apply(layout) for f in proposed], range(min(SCREEN, len(scorer.targets)))).mean(1)
    best = [proposed[i] for i in np.argsort(-means, kind="stable")[:FLIPS_CHECKED]]
    exact = scorer.rewards([f.apply(layout) for f in best]).mean(1)
    taken: set[int] = set()
    now = rewards
    for i in np.argsort(-exact, kind="stable"):
        flip = best[i]
        if exact[i] <= rewards.mean() or flip.at in taken:
            continue
        changed = flip.apply(layout)
        after = scorer.rewards([changed])[0]
        if after.mean() > now.mean():
            layout, now = changed, after
            taken.add(flip.at)
    return layout


def propose_flips(scorer: Scorer, layout: Layout) -> list[Flip]:
    """The :data:`FLIPS` replacements of largest first-order gain <dr/dx_t, E_new - E_old>, summed over the targets.

    The new phrase is plain text and, tokenised again, has no more tokens than before.
    """
    rm = scorer.rm
    own = [torch.tensor(rm.tokenizer(f" {p.phrase.text}", add_special_tokens=False).input_ids) for p in layout]
    gradients = _phrase_gradients(scorer, layout, own)
    table = rm.model.get_input_embeddings().weight.detach().float().cpu()
    plain = _plain_tokens(rm, len(table))
    ranked: list[tuple[float, int, int, int]] = []
    for i, (ids, g) in enumerate(zip(own, gradients, strict=True)):
        gain = g @ table.t() - (g * table[ids]).sum(1, keepdim=True)
        gain[:, ~plain] = -torch.inf
        values, tokens = gain.topk(min(8 * FLIPS_PER_TOKEN, gain.shape[1]), dim=1)
        ranked += [(float(v), i, k, int(t)) for k in range(len(ids)) for v, t in zip(values[k], tokens[k], strict=True)]
    flips: list[Flip] = []
    for value, i, k, token in sorted(ranked, key=lambda r: (-r[0], r[1:])):
        if not value > 0 or len(flips) == FLIPS:
            break
        if sum(f.at == i and f.token == k for f in flips) == FLIPS_PER_TOKEN:
            continue
        before = own[i].tolist()
        text = rm.tokenizer.decode([*before[:k], token, *before[k + 1 :]]).strip()
        if text and text != layout[i].phrase.text and (n := count_tokens(rm, text)) <= layout[i].phrase.tokens:
            flips.append(Flip(i, k, replace(layout[i].phrase, text=text, tokens=n, keeps=None)))
    return flips


def _phrase_gradients(scorer: Scorer, layout: Layout, own: Sequence[Tensor]) -> list[Float[Tensor, "tokens d"]]:
    """Each phrase's dr/dx at the embedding, summed over the targets in which its tokens ``own`` occur as they are."""
    rm = scorer.rm
    total = [torch.zeros(len(ids), rm.d_model) for ids in own]
    texts = [t.ids(rm, layout) for t in scorer.targets]
    for batch in rm.text_batches(texts):
        _, gradient = streams_and_gradients(rm, batch, ["embed"])["embed"]
        for text in batch.texts:
            ids, g = texts[text.pair], gradient[text.row, text.columns.to(gradient.device)].float().cpu()
            for i, phrase in enumerate(own):
                windows = ids.unfold(0, len(phrase), 1) if len(phrase) <= ids.numel() else ids.new_zeros(0, len(phrase))
                at = (windows == phrase).all(1).nonzero()
                if at.numel():
                    total[i] += g[int(at[-1]) : int(at[-1]) + len(phrase)]
    scorer.spent += len(texts)
    return total


def _plain_tokens(rm: RewardModel, size: int) -> Bool[Tensor, " vocabulary"]:
    """Which tokens are printable ASCII and not special."""
    special = set(rm.tokenizer.all_special_ids)
    texts = rm.tokenizer.batch_decode([[i] for i in range(min(size, len(rm.tokenizer)))])
    plain = [bool(t.strip()) and t.isascii() and t.isprintable() and i not in special for i, t in enumerate(texts)]
    return torch.tensor(plain + [False] * (size - len(plain)))
