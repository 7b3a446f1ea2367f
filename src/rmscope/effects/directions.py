"""The direction null: does a feature's direction matter, or does any push of that size at those tokens?

An ablation moves the stream by -f_tj d_j at the tokens where a feature fires. Beside it stand moves of the same norm at the
same tokens, along other directions: random ones, and differences of two real streams. Each direction is the same for all
responses, so that its mean effect over prompts is compared with that of the feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import Response, entries_of
from rmscope.effects.across import Members, contributions, take_out
from rmscope.model.reward_model import RewardModel
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


def effects_along(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    responses: Mapping[str, Response],
    members: Members,
    directions: Mapping[str, Float[Tensor, "n d"]],
) -> Float[Tensor, " n"]:
    """r minus r with the stream moved along each direction, by the norm of the joint ablation of ``members`` at each token.

    ``directions`` holds as many at each site of the whole stream; the moves are made at all sites of the members at once
    (:mod:`rmscope.effects.across`).
    """
    entries = {site: entries_of(responses[site].active, features) for site, features in members.items()}
    own = contributions(saes, {site: e for site, e in entries.items() if e[0].numel()})
    sizes = {site: (token, moves.norm(dim=1, keepdim=True)) for site, (token, moves) in own.items()}
    n = len(next(iter(directions.values())))
    changes = [{site: (token, -size * directions[site][i]) for site, (token, size) in sizes.items()} for i in range(n)]
    return take_out(rm, {site: responses[site] for site in members}, changes)
