"""Sparse autoencoders: families, training, formats, metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmscope.sae.base import Sae as Sae
    from rmscope.sae.config import SaeConfig as SaeConfig
    from rmscope.sae.metrics import measure_sae as measure_sae
    from rmscope.sae.trainer import train_saes as train_saes

_MODULES = {"Sae": "base", "SaeConfig": "config", "measure_sae": "metrics", "train_saes": "trainer"}


def __getattr__(name: str) -> Any:
    """Names are imported on first use: the command line reads the settings alone, without torch."""
    if name in _MODULES:
        return getattr(import_module(f"rmscope.sae.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rmscope.sae' has no attribute {name!r}")
