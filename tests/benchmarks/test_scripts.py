"""The scripts in benchmarks/ import what exists, and those that take flags parse them; what they measure is not run here."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
WITH_FLAGS = [path for path in SCRIPTS if "ArgumentParser(" in (text := path.read_text("utf-8")) and "def main(" in text]
PEERS = sorted((BENCHMARKS / "peers").glob("*.py"))


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import one another by name, as they do where one is run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in {path.stem for path in SCRIPTS} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports(path: Path) -> None:
    runpy.run_path(str(path), run_name="imported")


@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.stem)
def test_a_script_with_flags_shows_its_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_a_script_of_another_environment_compiles(path: Path) -> None:
    compile(path.read_text("utf-8"), str(path), "exec")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_readme_names_every_script(path: Path) -> None:
    assert f"`{path.name}`" in (BENCHMARKS / "README.md").read_text("utf-8")
