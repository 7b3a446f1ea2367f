"""Filters on scored pairs: those that the PM holds farthest apart."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def kept(scored: int, share: float | None, most: int | None) -> int:
    """How many of so many scored pairs stay: the share, rounded down, and at most ``most``; at least one."""
    wanted = [scored, *([] if share is None else [int(scored * share)]), *([] if most is None else [most])]
    return max(1, min(wanted))


def largest(delta: Float[np.ndarray, " pairs"], share: float | None, most: int | None) -> list[int]:
    """The places of the pairs of largest |Δr|, in file order; of equals the first."""
    order = np.argsort(-np.abs(delta), kind="stable")
    return sorted(order[: kept(len(delta), share, most)].tolist())
