"""Which features count as one, by their directions and by the tokens that they fire on."""

from __future__ import annotations

import numpy as np
import torch

from rmscope.ranking.similarity import found_again, merged_ranks
from tests.model.small import small_sae


def test_similar_features_share_the_rank_of_the_best() -> None:
    W = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.9, 0.1, 0], [0, 0, 1.0]])
    fires = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    # 2 is similar to 0 by its decoder; 3 fires with 1 on two of the four tokens where either fires: a half
    assert merged_ranks([0, 1, 2, 3], W, fires) == {0: 1, 1: 2, 2: 1, 3: 2}
    apart = np.eye(4, dtype=bool)
    assert merged_ranks([3, 1, 0, 2], W, apart) == {3: 1, 1: 2, 0: 3, 2: 3}


def test_a_feature_is_found_again_where_both_of_its_directions_are() -> None:
    first, other = small_sae(seed=0), small_sae(seed=1)
    assert found_again(first, first, [0, 5, 9]) == [True] * 3
    assert found_again(first, other, [0, 5, 9]) == [False] * 3  # random directions
    with torch.no_grad():
        other.W_dec[3], other.W_enc[:, 3] = 2 * first.W_dec[0], 3 * first.W_enc[:, 0]  # cosines know no lengths
        other.W_dec[4] = first.W_dec[5]  # the decoder alone is not enough
    assert found_again(first, other, [0, 5, 9]) == [True, False, False]
