"""What the machine's products are fast in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def is_amd() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "AuthenticAMD" in cpu.read_text()


@cache
def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products run faster than float32.

    On a CPU: with AMX, 3 to 5 times; with AVX512-BF16 on AMD, about twice. On an Intel server whose AMX is switched off,
    AVX512-BF16 alone reached 180 GFLOP/s against 330 in float32 (two cores), so it does not count there. The rule is
    fixed, not timed, so that a run that goes on after a kill makes the same choice.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    amx = able.get("amx_bf16") or able.get("amx_tile")
    return device == "cpu" and bool(amx or (able.get("avx512_bf16") and is_amd()))


def place(device: str) -> str:
    """The device that ``auto`` means: the GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_products(device: torch.device, wanted: bool = True) -> Any:
    """A context in which a float32 model multiplies in bfloat16 where that is fast and wanted; sums and losses stay."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_fast_bfloat16(device.type))
