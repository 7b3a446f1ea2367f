"""Where a model lies by default, and what its products are made in."""

from __future__ import annotations

import pytest
import torch

from rmscope import hardware
from rmscope.errors import InputError


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_the_gpu_where_there_is_one_and_what_is_named_stays(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert [hardware.place(d) for d in ("auto", "cpu", "cuda:1")] == ["cuda" if gpu else "cpu", "cpu", "cuda:1"]


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_products_are_bfloat16_only_where_that_is_fast_and_wanted(
    able: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda _device: able)
    x = torch.ones(2, 2)
    with hardware.fast_products(torch.device("cpu"), wanted):
        assert (x @ x).dtype == (torch.bfloat16 if able and wanted else torch.float32)
        assert (x + x).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "gpus", "told"),
    [
        ("cuda", 0, "--device cuda needs a GPU, and torch sees none"),
        ("cuda:2", 2, "There is no --device cuda:2: this machine has 2 GPUs"),
        ("mps", 1, "--device mps is not supported: rmscope runs on a CPU or a GPU of CUDA; name cpu or cuda"),
        ("meta", 0, "--device meta is not supported"),
        ("banana", 1, "--device banana is not a device"),
    ],
)
def test_a_device_that_is_not_there_is_told(device: str, gpus: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=told):
        hardware.check_device(device)
    for present in ("cpu", "auto", *(["cuda:1"] if gpus == 2 else [])):
        hardware.check_device(present)
