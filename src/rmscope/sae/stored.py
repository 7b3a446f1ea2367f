"""Features of stored activations, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.sae.base import Active, Sae
from rmscope.statistics import Array

CHUNK = 4096


def active_chunks(store: ActivationStore, sae: Sae, site: str, rows: Array) -> Iterator[tuple[int, Tensor, Active]]:
    """(place in ``rows``, x, active features) of some stored rows, :data:`CHUNK` at a time."""
    for start in range(0, rows.size, CHUNK):
        x = store.rows(site, torch.from_numpy(rows[start : start + CHUNK]))
        yield start, x, sae.active(x)


def active_entries(store: ActivationStore, sae: Sae, site: str, rows: Array) -> Iterator[tuple[Array, Array, Array]]:
    """(place in ``rows``, feature, value) of the active entries of some stored rows, chunk by chunk."""
    for start, _, active in active_chunks(store, sae, site, rows):
        yield active.token.numpy() + start, active.feature.numpy(), active.value.numpy()
