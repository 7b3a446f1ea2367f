"""Folders are replaced whole, and only by folders of their own kind: what a user keeps elsewhere is never deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rmscope.errors import InputError
from rmscope.io import atomic_folder, check_replaceable, check_writable, local_path

MARK = "kind.json"


def filled(folder: Path, **files: str) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def write(folder: Path, text: str = "new") -> None:
    with atomic_folder(folder, MARK) as target:
        (target / MARK).write_text(text)


def test_a_folder_of_the_same_kind_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    old = filled(tmp_path / "kept", kind_json="old", more_txt="more")

    def fill() -> None:
        with atomic_folder(tmp_path / "kept", MARK) as folder:
            (folder / MARK).write_text("new")
            raise RuntimeError("cut short")

    with pytest.raises(RuntimeError):
        fill()
    assert contents(tmp_path / "kept") == old
    write(tmp_path / "kept")
    assert contents(tmp_path / "kept") == {MARK: "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]  # nothing is left beside it


def test_the_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, moves = filled(tmp_path / "kept", kind_json="old"), list[str]()
    replace = os.replace

    def second_fails(source: Path, target: Path) -> None:
        moves.append(str(target))
        if len(moves) == 2:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "kept")
    assert contents(tmp_path / "kept") == old
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_folder_of_another_kind_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    thesis = filled(tmp_path / "thesis", chapter_tex="years of work")
    for refused in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(InputError, match="not overwritten"):
            check_replaceable(refused, MARK)
        with pytest.raises(InputError, match="not overwritten"):
            write(refused)
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(InputError, match="not overwritten"):
        write(tmp_path / "link")
    assert contents(tmp_path / "thesis") == thesis
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "thesis"]


def test_what_is_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    def slow() -> None:
        with atomic_folder(tmp_path / "out", MARK) as target:
            (target / MARK).write_text("new")
            filled(tmp_path / "out", notes_txt="theirs")

    with pytest.raises(InputError, match="not overwritten"):
        slow()
    assert contents(tmp_path / "out") == {"notes.txt": "theirs"}


def test_an_empty_folder_is_taken_and_the_current_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert contents(tmp_path / "empty") == {MARK: "new"}
    filled(tmp_path / "inside", kind_json="old")
    filled(tmp_path / "inside" / "deep")
    monkeypatch.chdir(tmp_path / "inside" / "deep")
    for here in (Path("."), Path(".."), tmp_path / "inside"):
        with pytest.raises(InputError, match="current folder"):
            write(here)


@pytest.mark.parametrize("above", ["file", "/dev/null"])
def test_what_lies_under_a_file_cannot_be_written(tmp_path: Path, above: str) -> None:
    (tmp_path / "file").write_text("x")
    for below in ("x", "x/y"):
        with pytest.raises(InputError, match="is no folder; name another place"):
            check_writable(tmp_path / above / below)
    check_writable(tmp_path / "new" / "newer")
    check_writable(tmp_path / "file")
    with pytest.raises(InputError, match="is no path that can be written"):
        check_writable(tmp_path / ("a" * 5000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_name_stands_for_a_path_or_is_refused(tmp_path: Path) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("~/x") == Path.home() / "x"
    assert local_path("someone/model") == Path("someone/model")
    for name in ("", " ", Path("a" * 5000), "~no_such_user_here/x"):
        with pytest.raises(InputError, match=r"is empty|is no path that can be opened") as raised:
            local_path(name)
        assert len(str(raised.value)) < 200
