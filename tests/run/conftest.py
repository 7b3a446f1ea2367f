"""The small PM and its finished run, made once for all processes; tests that change the run copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmscope.run.run import Run
from tests.model.small import saved_pm
from tests.run.small import settings
from tests.sharing import shared_folder


@pytest.fixture(scope="session")
def pm(tmp_path_factory: pytest.TempPathFactory) -> str:
    def make(folder: Path) -> None:
        settings(saved_pm(folder), folder / "no run")  # writes its pairs too

    return str(shared_folder(tmp_path_factory, "run_pm", make))


@pytest.fixture(scope="session")
def done(pm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        Run.create(settings(pm, out)).go()

    return shared_folder(tmp_path_factory, "run_done", make)
