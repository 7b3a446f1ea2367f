"""Shapes and types of the numerical rooms are checked while the tests run (jaxtyping, beartype)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("here", deadline=None)  # machines are slow and shared
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

CHECKED = ["rmscope.model", "rmscope.effects"]

install_import_hook(CHECKED, "beartype.beartype").__enter__()


@pytest.fixture(scope="session", autouse=True)
def harvested_in_float32() -> Iterator[None]:
    """Small random PMs amplify rounding: what is harvested of them is compared in float32 on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmscope.activations.harvest.fast_products", lambda _device, wanted: nullcontext())
        yield
