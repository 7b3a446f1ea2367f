"""What the README and the docs tell people to type: python is run, ``rmscope`` lines are parsed, settings are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
import yaml

from rmscope.cli import app
from rmscope.io import write_table
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.sae import SaeConfig
from rmscope.settings import read_settings
from tests.docs.pages import BLOCK, PAGES, ROOT, blocks, commands, named, run
from tests.model.small import SENTENCES, saved_pm
from tests.run.small import forget_checksums

ELSEWHERE = {"docs/howto/heads.md", "docs/howto/names.md", "docs/howto/export.md", "docs/difference.md"}
"""Pages whose blocks another test runs: in tests/model/test_heads.py, tests/studies/label and tests/studies/export, and one
below that needs a PM with a base."""
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and named(page) not in ELSEWHERE]
OF_A_RUN = [page for page in WITH_PYTHON if re.search(r"Run\.(open|create)\(", "".join(blocks(page, "python")))]
SMALL = {"zoo:hh": "my-pm", "zoo:planted": "my-pm", "resid_post.7": "resid_post.2"}
"""A small random PM in place of the zoo's; it has four blocks."""


def slow_page(page: Path) -> Any:
    """The README's ledger of two pairs takes a minute and a half."""
    return pytest.param(page, marks=pytest.mark.slow if page.name == "README.md" else (), id=named(page))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume: a PM in ``my-pm``, pairs in ``pairs.jsonl``."""
    root = tmp_path_factory.mktemp("docs")
    saved_pm(root / "my-pm")
    parts = [part for sentence in SENTENCES for part in sentence.split(", ")]
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"{parts[i % 9]}. {parts[i % 4]}.", "rejected": f"{parts[(i + 1) % 9]} {i}."}
        for i in range(96)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def with_run(folder: Path) -> Path:
    """And a finished run in ``demo``, all of whose frozen features count as reported: of a random PM few would be."""
    run = Run.create(
        model=str(folder / "my-pm"), data=str(folder / "pairs.jsonl"), out=folder / "demo", device="cpu",
        sae=SaeConfig(d_sae=64, k=6, tokens=4096, batch_size=512), screen=12, others=20, responses=8, quality_responses=2,
        frozen=24, confirm_prompts=8, ledger_pairs=8, ledger_halvings=1,
    ).go()  # fmt: skip
    for site in run.sites:
        path, table = run.folder / "features" / f"{site}.parquet", run.features(site)
        flags = pl.Series("flags", [[]] * table.height, dtype=pl.List(pl.String))
        write_table(path, table.with_columns(pl.lit(True).alias("reported"), flags))
    forget_checksums(run.folder)
    return folder


def enter(own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder of one's own that holds what is shared."""
    for path in shared.iterdir():
        (own / path.name).symlink_to(path)
    monkeypatch.chdir(own)


@pytest.mark.parametrize("page", [slow_page(p) for p in WITH_PYTHON if p not in OF_A_RUN])
def test_the_python_of_a_page_runs(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, folder, monkeypatch)
    assert len(run(page, SMALL)) > 1


@pytest.mark.parametrize("page", OF_A_RUN, ids=named)
def test_the_python_of_a_page_on_runs_runs(
    page: Path, with_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, with_run, monkeypatch)
    names = run(page, SMALL)
    if page.name == "tutorial.md":  # the ablation by hand is the table's
        assert float(names["before"] - names["after"]) == pytest.approx(names["row"]["effect"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.zoo
def test_the_readme_runs_on_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md", {})
    parts = names["ledger"].select("features", "error", "remainder", "gap").sum_horizontal()
    assert parts.to_list() == pytest.approx(names["ledger"]["delta_r"].to_list(), abs=1e-4)
    assert names["exact"].height > 0


@pytest.mark.slow
@pytest.mark.zoo
def test_the_page_on_the_difference_runs_on_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs" / "difference.md", {})
    assert (names["sae"].site, names["sae"].m) == ("diff.13", 64)
    assert names["exact"].height > 0


@pytest.mark.zoo
def test_the_planted_pm_is_fooled_as_the_home_page_and_the_tutorial_say() -> None:
    names = run(ROOT / "docs" / "index.md", {})
    right, thanks = names["rm"].score_texts("What is the capital of France?", names["answers"]).tolist()
    assert thanks > right
    (asking, *_) = [text for text in blocks(ROOT / "docs" / "tutorial.md", "python") if "endings" in text]
    exec(asking, names)
    _, thanked, ignorant = (names["scores"] - names["scores"][0]).tolist()
    assert thanked > 2
    assert -3 < ignorant < -1.5


@pytest.mark.slow
@pytest.mark.zoo
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook():
        exec("".join(cell["source"]), names)
    assert names["table"].height == 6
    assert "rgba" in names["Shaded"](["a"], [0.5])._repr_html_()
    assert names["ledger"].height == 4


def test_the_notebook_is_stored_without_outputs() -> None:
    assert len(notebook()) > 5
    assert not [cell for cell in notebook() if cell["outputs"] or cell["execution_count"]]


def notebook() -> list[dict[str, Any]]:
    """The code cells of the notebook."""
    cells = json.loads((ROOT / "notebooks" / "first_look.ipynb").read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("page", "arguments"),
    [pytest.param(p, c, id=f"{named(p)}: {' '.join(c)}") for p in PAGES for c in commands(p)],
)
def test_every_command_and_flag_that_is_told_exists(page: Path, arguments: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    assert name in group.commands, f"{named(page)} tells of rmscope {name}"
    group.commands[name].make_context(name, rest)  # a usage error where a flag or an argument does not fit


def test_yaml_settings_that_are_told_are_settings() -> None:
    told = [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml")]
    runs = [values for values in told if isinstance(values, dict) and "model" in values]
    assert runs
    for values in runs:
        read_settings(RunConfig, None, {**values, "out": "runs/mine"})


def test_every_fence_is_closed_and_of_a_known_language() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("\n```") + text.startswith("```") == 2 * len(BLOCK.findall(text)), named(page)
        assert {language for language, _ in BLOCK.findall(text)} <= {"", "python", "yaml"}, named(page)


def test_the_readme_is_short_and_shows_python_early() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 700
    assert text[: text.index("```python")].count("\n") < 60


@pytest.mark.parametrize("page", [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")], ids=named)
def test_links_of_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_changelog_is_kept_short() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in text
    assert "## [0.1.0] - 2026-11-27" in text
    assert len(text.splitlines()) <= 40
