"""Shapes and types of the numerical rooms are checked while the tests run (jaxtyping, beartype)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

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


@pytest.fixture
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder where transformers keeps the code that comes with checkpoints. The user's own stays as it is.

    The package that holds such code remembers the folder in which it was first found, so it is forgotten around the test.
    """
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    forget_code_of_checkpoints()
    yield folder
    forget_code_of_checkpoints()
    sys.path[:] = [entry for entry in sys.path if entry != str(folder)]


def forget_code_of_checkpoints() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
