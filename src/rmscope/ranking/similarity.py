"""When two features count as one: by their directions, or by the tokens that they fire on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from rmscope.sae.base import Sae
from rmscope.statistics import Array

COSINE = 0.7
"""Features with a decoder cosine of at least this count as one; across two SAEs the encoder cosine must reach it too."""
JACCARD = 0.5
"""Features whose firing tokens have at least this Jaccard index count as one."""


def cosines(sae: Sae, other: Sae, features: Sequence[int]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Cosines of each of ``features`` with every feature of ``other``: of the decoders, and of the encoders."""
    weights = ((sae.W_dec, other.W_dec), (sae.W_enc.t(), other.W_enc.t()))
    decoder, encoder = (normalize(own[list(features)], dim=1) @ normalize(all_, dim=1).t() for own, all_ in weights)
    return decoder, encoder


def merged_ranks(features: Sequence[int], W_dec: Float[Tensor, "m d"], fires: Bool[Array, "tokens n"]) -> dict[int, int]:
    """Ranks of features [n], given the best first. A feature that counts as one with a better feature shares its rank.

    ``fires`` says on which tokens each of the features fires.
    """
    rows = normalize(W_dec[list(features)], dim=1)
    together = fires.T.astype(np.float64) @ fires
    each = together.diagonal()
    jaccard = together / np.maximum(each[:, None] + each[None] - together, 1)
    similar = ((rows @ rows.t()).numpy() >= COSINE) | (jaccard >= JACCARD)
    ranks: dict[int, int] = {}
    heads: list[int] = []
    for i, feature in enumerate(features):
        head = next((place for place, h in enumerate(heads) if similar[i, h]), len(heads))
        if head == len(heads):
            heads.append(i)
        ranks[feature] = head + 1
    return ranks
