"""What single tokens do: features ablated at one token alone, and the tokens before a peak left out one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.ablation import Response, entries_of
from rmscope.effects.across import Members, ablate_entries_across
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae

MOST_BEFORE = 32
"""Tokens before a peak that are left out, at most: the nearest ones."""


def token_effects(
    rm: RewardModel, saes: Mapping[str, Sae], responses: Mapping[str, Response], members: Members
) -> Float[Tensor, " span"]:
    """The effect of ablating some features at one token alone, for each token of the span; 0 where none of them fires.

    ``responses`` holds one response at every site. Later tokens read the stream of this one, so these effects need not sum
    to that of ablating the features everywhere.
    """
    entries = {site: entries_of(responses[site].active, features) for site, features in members.items()}
    tokens = torch.cat([token for token, _, _ in entries.values()]).unique()
    alone = [
        {
            site: (token[token == t], feature[token == t], value[token == t])
            for site, (token, feature, value) in entries.items()
        }
        for t in tokens
    ]
    effects = torch.zeros(len(next(iter(responses.values())).x))
    effects[tokens] = ablate_entries_across(rm, saes, responses, alone)
    return effects


@torch.no_grad()
def activations_without(
    rm: RewardModel, sae: Sae, site: str, ids: Int[Tensor, " tokens"], at: int, feature: int
) -> tuple[float, dict[int, float]]:
    """(f_j at the token ``at``, f_j there with one token before it left out of the text, by that token's place).

    The text's first token always stays, and of the others the nearest :data:`MOST_BEFORE` are tried. Of a decoder the text
    up to ``at`` is run.
    """
    ids = ids[: at + 1] if rm.causal else ids
    tried = range(max(1, at - MOST_BEFORE), at)
    texts = [ids, *(torch.cat([ids[:i], ids[i + 1 :]]) for i in tried)]
    values = torch.zeros(len(texts))
    for batch in rm.text_batches(texts):
        streams = rm.streams(batch, [site])[site]
        for text in batch.texts:
            x = streams[text.row, text.columns[at - int(text.pair > 0)].to(streams.device)].float().cpu()
            values[text.pair] = sae.encode(x[None])[0, feature]
    return float(values[0]), dict(zip(tried, values[1:].tolist(), strict=True))
