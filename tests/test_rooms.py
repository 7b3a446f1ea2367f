"""The rooms of the house: each imports only from rooms before it, no two files import each other, none grows too large."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "rmscope"
STUDIES = ("edit", "compare", "evaluate", "experiment", "sufficiency", "jailbreak", "label", "export", "audit")
ROOMS = (
    "errors", "hardware", "ranks", "statistics", "io", "settings", "pairs", "model", "activations", "sae", "effects",
    "ranking", "evaluation", "planted", "report", "run", "studies", *(f"studies.{name}" for name in STUDIES), "api", "app",
    "cli",
)  # fmt: skip
"""In the order in which data walks; each study is a room. docs/architecture.md tells what each is for."""
FILES = sorted(SRC.rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The files of the package that a file imports, anywhere in it: at its top, in functions, for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names}
    return {name for name in names if name in MODULES}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def room(name: str) -> str:
    """The room of a file: the longest room name that its path begins with."""
    return max((r for r in ROOMS if f"{name}.".startswith(f"rmscope.{r}.")), key=len, default="")


def test_every_room_imports_only_from_rooms_before_it() -> None:
    place = {name: i for i, name in enumerate(ROOMS)}
    assert {room(name) for name in MODULES if name != "rmscope"} == set(ROOMS)
    back = [
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in others
        if name != "rmscope" and other != "rmscope" and place[room(other)] > place[room(name)]
    ]
    assert not back


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name in done:
            return
        for other in sorted(IMPORTS[name] - {"rmscope"}):
            walk(other, (*way, name))
        done.add(name)

    for name in sorted(set(MODULES) - {"rmscope"}):
        walk(name, ())
    assert len(done) == len(MODULES) - 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_no_room_holds_a_quarter_of_the_code() -> None:
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    of_room = {r: sum(n for name, n in lines.items() if room(name) == r) for r in ROOMS}
    largest = max(of_room, key=lambda r: of_room[r])
    assert of_room[largest] < sum(lines.values()) / 4, (largest, of_room[largest])
