"""The direction null: does a feature's direction matter, or does any push of that size at those tokens?

An ablation moves the stream by -f_tj d_j at the tokens where a feature fires. Beside it stand moves of the same norm at the
same tokens, along other directions: random ones, and differences of two real streams. Each direction is the same for all
responses, so that its mean effect over prompts is compared with that of the feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Response, rewards_on_span
from rmscope.model.base import whole_stream
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import BOTH, kind_of
from rmscope.sae.base import Sae

DRAWS = 16
"""Directions of each kind."""


def random_directions(d: int, n: int, seed: int) -> Float[Tensor, "n d"]:
    """Random unit directions."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def real_directions(x: Float[Tensor, "tokens d"], n: int, seed: int) -> Float[Tensor, "n d"]:
    """Unit differences of two tokens' streams, drawn at random; fewer where there are too few different tokens."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (x[torch.randint(len(x), (4 * n,), generator=generator)] for _ in range(2))
    moves = first - second
    return torch.nn.functional.normalize(moves[moves.norm(dim=1) > 0][:n], dim=1)


def whole_moves(moves: Float[Tensor, "n site_d"], site: str) -> Float[Tensor, "n d"]:
    """How far the whole stream moves where a part of it, or both, move."""
    return whole_stream(site, moves, torch.zeros_like(moves)) if kind_of(site) == BOTH else moves


def effects_along(
    rm: RewardModel, sae: Sae, response: Response, site: str, features: Sequence[int], directions: Float[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """r minus r with the stream moved along each direction, by the norm of the features' ablation at each token."""
    active = response.active
    inside = torch.isin(active.feature, torch.as_tensor(list(features)))
    token, feature, value = active.token[inside], active.feature[inside], active.value[inside]
    if not token.numel():
        return torch.zeros(len(directions))
    first = int(token.min())
    ablation = torch.zeros_like(response.x[first:])
    ablation.index_add_(0, token - first, value[:, None] * sae.W_dec[feature])
    size = whole_moves(ablation, site).norm(dim=1)
    moves = size[None, :, None] * directions[:, None]
    if kind_of(site) == BOTH:
        moves = torch.cat([moves, torch.zeros_like(moves)], -1)  # a move of either part moves the whole stream alike
    streams = response.x[first:] + moves
    return response.text.reward - rewards_on_span(rm, response.text, site, response.start + first, streams).float().cpu()
