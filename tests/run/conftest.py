"""The small PM and its finished run, made once for the folder; tests that change the run copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmscope.run.run import Run
from tests.model.small import saved_pm
from tests.run.small import settings


@pytest.fixture(scope="package")
def pm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_pm(tmp_path_factory.mktemp("pm"))


@pytest.fixture(scope="package")
def done(pm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    Run.create(settings(pm, out)).go()
    return out
