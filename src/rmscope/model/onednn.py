"""Faster float32 linear maps on CPUs where MKL takes its slow path.

torch multiplies through MKL, which does not use AVX-512 on AMD processors. oneDNN does: 300 against 130 GFLOP/s on two cores
of a Zen 5 server. There, frozen linear maps run through a copy of their weight in oneDNN's layout, forward and backward.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rmscope.hardware import is_amd

MOST_BYTES = 2 << 30
"""Models with more bytes of linear weights keep MKL, because the copies would double their memory."""
BATCH = 512
"""The number of rows for which oneDNN chooses its layout."""


class _PackedWeight:
    """A frozen weight [out, in] in oneDNN's layout. Its transpose is packed when a gradient first needs it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.forward = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), BATCH)

    @cached_property
    def backward(self) -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().t().contiguous(), BATCH)


class _Product(torch.autograd.Function):
    """x W^T + b, with a gradient for x only: the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _PackedWeight) -> Tensor:
        ctx.packed = packed
        return torch.ops.mkldnn._linear_pointwise(x, packed.forward, packed.bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), ctx.packed.backward, None, "none", [], ""), None


def use_onednn(model: nn.Module) -> bool:
    """Makes a float32 model on an AMD CPU with AVX-512 run its frozen linear maps through oneDNN; True if it did."""
    maps = [m for m in model.modules() if type(m) is nn.Linear and m.out_features > 1]
    size = sum(m.weight.numel() * 4 for m in maps)
    frozen = all(m.weight.dtype == torch.float32 and m.weight.device.type == "cpu" for m in maps)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    offered = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    faster = is_amd() and able.get("avx512_f") and offered and torch.backends.mkldnn.is_available()
    if not (maps and frozen and size <= MOST_BYTES and faster):
        return False
    for linear in maps:
        linear.forward = _forward(linear)  # type: ignore[method-assign]
    return True


def _forward(linear: nn.Linear) -> Any:
    packed = _PackedWeight(linear.weight, linear.bias)

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32 or linear.weight is not packed.weight:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return _Product.apply(x, packed)  # type: ignore[no-any-return, no-untyped-call]

    return forward
