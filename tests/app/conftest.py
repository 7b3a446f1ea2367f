"""A finished run of a small PM, some of whose concepts are reported, and the app on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

from fastapi.testclient import TestClient

from rmscope.app.library import Library
from rmscope.app.server import create_app
from tests.model.small import saved_pm
from tests.run.small import run_with_concepts
from tests.sharing import shared_folder

ORIGIN = "http://localhost"


@pytest.fixture(scope="session")
def app_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of this process's own. It is made once for all processes that test, and copied."""
    own = tmp_path_factory.mktemp("app") / "small run"
    made = shared_folder(tmp_path_factory, "app_run", lambda out: run_with_concepts(saved_pm(out.with_name("app_pm")), out))
    shutil.copytree(made, own)
    return own


@pytest.fixture
def client(app_run: Path) -> Iterator[TestClient]:
    """A browser's requests: from a page of the app itself. Labels are gone before and after."""
    labels = app_run / "labels.sqlite"
    labels.unlink(missing_ok=True)
    with TestClient(create_app(Library(app_run)), base_url=ORIGIN, headers={"origin": ORIGIN}) as client:  # type: ignore[arg-type]
        yield client
    labels.unlink(missing_ok=True)
