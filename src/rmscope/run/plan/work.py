"""Amounts of work, and the few formulas that all stages are made of.

A token that runs through a block costs 2 FLOPs per weight of the block, and 4 per dimension of the queries and token that it
attends to:

    FLOPs = tokens x blocks x (2 weights of a block + 4 attended tokens x width of the queries)

A backward pass for the stream alone costs as much as the forward. Training one SAE on n tokens, in steps of b:

    encoder 2 n d m FLOPs    sparse products 4 n k d bytes    weights 100 d m n / b bytes    rows 4 n d bytes
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

from rmscope.run.plan.shape import Shape

FLOPS = ("forward", "harvest", "ablation", "gradient", "encode", "train")
"""The kinds of work that are counted in FLOPs."""
WEIGHT_BYTES = 100
"""Bytes that a step moves per weight of the encoder: Adam 56 (weights, gradients and two moments of both matrices), the
decoder's projection and norm 28, gradients 8, a copy in bfloat16 6."""


@dataclass(frozen=True)
class Work:
    """How much of each kind of work there is."""

    forward: float = 0.0
    """FLOPs of the PM and its base, in batches or text by text."""
    harvest: float = 0.0
    """The same where the stream is only stored."""
    ablation: float = 0.0
    """FLOPs of runs that are resumed at a site."""
    gradient: float = 0.0
    """FLOPs of backward passes."""
    encode: float = 0.0
    """FLOPs of encoders whose features are read, in float32."""
    train: float = 0.0
    """FLOPs of encoders in training."""
    sparse: float = 0.0
    """Bytes of the entries of sparse products in training, as they are and not as they are moved."""
    weights: float = 0.0
    """Bytes of weights, gradients and moments that steps of training move."""
    rows: float = 0.0
    """Bytes of rows that are read from the store, as float32."""
    disk: float = 0.0
    """Bytes that are written."""
    calls: float = 0.0
    """Blocks times forwards: what a block costs in each beside its products."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * a for a in astuple(self)))

    __rmul__ = __mul__

    @property
    def flops(self) -> float:
        return float(sum(getattr(self, name) for name in FLOPS))

    def seconds(self, rates: Any) -> float:
        """On one device."""
        return float(sum(getattr(self, f.name) / getattr(rates, f.name) for f in fields(self)))


def text_flops(pm: Shape, tokens: float, attended: float, blocks: float) -> float:
    """FLOPs of some tokens through some blocks, each beside ``attended`` tokens."""
    return tokens * blocks * (2 * pm.block + 4 * attended * pm.attention)


def step_work(d: int, m: int, k: float, tokens: float, steps: float = 1.0) -> Work:
    """Steps of training one SAE on so many tokens in all; without reading them."""
    return Work(train=2 * tokens * d * m, sparse=4 * tokens * k * d, weights=WEIGHT_BYTES * d * m * steps)


@dataclass(frozen=True)
class Amount:
    """The work of a stage: what ranks share, in how many equal parts, and what only one of them does."""

    shared: Work = Work()
    parts: int = 1
    serial: Work = Work()

    @property
    def work(self) -> Work:
        return self.shared + self.serial

    def seconds(self, rates: Any, ranks: int) -> float:
        """With so many ranks: the busiest one decides."""
        busiest = -(-self.parts // ranks) / self.parts
        return self.shared.seconds(rates) * busiest + self.serial.seconds(rates)
