"""One text after its clean run, and the key-value caches that are cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CleanRun:
    """One text after its clean run: ids [T], the stream at each watched site [T, d], keys and values a layer, r."""

    ids: Tensor
    streams: dict[str, Tensor]
    keys: list[tuple[Tensor, Tensor]]
    reward: float


def cache_of(keys: list[tuple[Tensor, Tensor]], length: int, rows: int) -> Any:
    """A cache of the first ``length`` positions, as views: expanded to ``rows`` without a copy."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for i, (k, v) in enumerate(keys):
        cache.update(k[:, :, :0], v[:, :, :0], i)
        layer = cache.layers[i]
        layer.keys = k[:, :, :length].expand(rows, -1, -1, -1)
        layer.values = v[:, :, :length].expand(rows, -1, -1, -1)
    return cache
