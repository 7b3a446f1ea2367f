"""The clean run of one text, and the key-value caches that are cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CleanRun:
    """What an unedited forward pass of one text left behind."""

    ids: Tensor
    """Token ids [T], up to the read position."""
    streams: dict[str, Tensor]
    """The residual stream at each watched site, [T, d]."""
    keys: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, [1, kv_heads, T, size]."""
    reward: float


def cache_of(keys: list[tuple[Tensor, Tensor]], length: int, rows: int) -> Any:
    """A transformers cache of the first ``length`` positions for ``rows`` rows. It holds views: nothing is copied."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for i, (k, v) in enumerate(keys):
        cache.update(k[:, :, :0], v[:, :, :0], i)
        layer = cache.layers[i]
        layer.keys = k[:, :, :length].expand(rows, -1, -1, -1)
        layer.values = v[:, :, :length].expand(rows, -1, -1, -1)
    return cache
