"""Sparse autoencoders: families, training, formats, metrics."""

from rmscope.sae.base import Active, Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.metrics import Metrics, measure
from rmscope.sae.trainer import train_saes

__all__ = ["Active", "Metrics", "Sae", "SaeConfig", "measure", "train_saes"]
