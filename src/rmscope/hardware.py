"""What the machine's products are fast in."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rmscope.errors import InputError


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


def check_device(device: str) -> None:
    """InputError where a device is none, is of a kind that is not supported, or is not in this machine."""
    try:
        named = torch.device(place(device))
    except RuntimeError as error:
        raise InputError(
            f"--device {device} is not a device: a PM is studied on one (cpu, cuda, cuda:1), not spread over several; "
            "name a device that is large enough, or halve the PM with --dtype bfloat16."
        ) from error
    if named.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is not supported: rmscope runs on a CPU or a GPU of CUDA; name cpu or cuda.")
    if named.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device} needs a GPU, and torch sees none; leave it out, or name cpu.")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"There is no --device {device}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0 on."
        )


def memory(device: str) -> int:
    """Bytes of memory that a device has in all; of a CPU, what each process of a machine has that torchrun started there."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fast_products(device: torch.device, wanted: bool = True) -> Any:
    """A context in which a float32 model multiplies in bfloat16 where that is fast and wanted; sums and losses stay."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_fast_bfloat16(device.type))
