"""Sparse autoencoders: families, training, formats, metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmscope.sae.base import Active, Sae
    from rmscope.sae.config import SaeConfig
    from rmscope.sae.metrics import Metrics, measure_sae
    from rmscope.sae.trainer import train_saes

_WHERE = {
    "Active": "rmscope.sae.base",
    "Metrics": "rmscope.sae.metrics",
    "Sae": "rmscope.sae.base",
    "SaeConfig": "rmscope.sae.config",
    "measure_sae": "rmscope.sae.metrics",
    "train_saes": "rmscope.sae.trainer",
}

__all__ = ["Active", "Metrics", "Sae", "SaeConfig", "measure_sae", "train_saes"]


def __getattr__(name: str) -> Any:
    """Names are imported on first use: the command line reads the settings alone, without torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'rmscope.sae' has no attribute {name!r}")
