"""Which features count as one, by their directions and by the tokens that they fire on."""

from __future__ import annotations

import numpy as np
import torch

from rmscope.ranking.similarity import merged_ranks


def test_similar_features_share_the_rank_of_the_best() -> None:
    W = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.9, 0.1, 0], [0, 0, 1.0]])
    fires = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    # 2 is similar to 0 by its decoder; 3 fires with 1 on two of the four tokens where either fires: a half
    assert merged_ranks([0, 1, 2, 3], W, fires) == {0: 1, 1: 2, 2: 1, 3: 2}
    apart = np.eye(4, dtype=bool)
    assert merged_ranks([3, 1, 0, 2], W, apart) == {3: 1, 1: 2, 0: 3, 2: 3}
