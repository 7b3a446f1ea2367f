"""Activations with a known dictionary: x = shift + Σ a_j v_j, a sparse and positive."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rmscope.activations.store import ActivationStore, StoreWriter


def planted_activations(
    n: int, d: int, directions: int, firing: int, seed: int = 0, size: float = 3.0
) -> tuple[Tensor, Tensor]:
    """(x [n, d], directions [directions, d])"""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(directions, d, generator=g)
    v = v / v.norm(dim=1, keepdim=True)
    which = torch.rand(n, directions, generator=g).topk(firing, dim=1).indices
    a = torch.zeros(n, directions).scatter(1, which, 0.5 + torch.rand(n, firing, generator=g))
    return size * (torch.randn(d, generator=g) / d**0.5 + a @ v), v


def store_of(root: Path, x: dict[str, Tensor]) -> ActivationStore:
    n, d = next(iter(x.values())).shape
    column = torch.arange(n)
    with StoreWriter(root, list(x), d, {"model": "toy/pm", "data": "planted"}, shard_tokens=700) as writer:
        for site, rows in x.items():
            writer.add(site, rows, column, column // 10, column % 10, column % 3)
    return ActivationStore.open(root)
