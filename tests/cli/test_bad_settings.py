"""Settings that cannot be meant are one sentence, exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import one_sentence, rmscope_command

FILES: list[tuple[str, bytes, str]] = [
    ("null.yaml", b"sae:\n", "Setting sae in null.yaml holds nothing instead of key: value lines"),
    ("text.yaml", b"sae: hello\n", "Setting sae in text.yaml holds 'hello' instead of key: value lines"),
    ("list.yaml", b"sae: [k, 3]\n", "Setting sae in list.yaml holds"),
    ("number.yaml", b"1: 2\nmodel: x\n", "The config number.yaml has a setting called 1, which is no name"),
    ("inner.yaml", b"sae: {3: 4}\n", "Setting sae in inner.yaml has a key that is no name (3)"),
    ("utf16.yaml", "model: x\n".encode("utf-16"), "utf16.yaml is no text in UTF-8; save it as UTF-8."),
    ("binary.yaml", bytes(range(256)), "binary.yaml is no text in UTF-8"),
    ("zeros.yaml", b"m\0o\0", "zeros.yaml is no YAML: "),
    ("date.yaml", b"seed: 2020-13-45\n", "date.yaml is no YAML: month must be in 1..12"),
    ("deep.yaml", b"sae: " + b"[" * 5000, "deep.yaml is no YAML: "),
    (
        "seed.yaml",
        b"seed: 17592186044416\n",
        "Setting seed in seed.yaml, 17592186044416: input should be less than 4294967296",
    ),
]


@pytest.mark.parametrize(("name", "raw", "told"), FILES, ids=[name for name, _, _ in FILES])
def test_a_file_that_holds_no_settings_is_one_sentence(
    name: str, raw: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    done = rmscope_command("run", name, "--model", "none", "--data", "none.jsonl", "--out", "run")
    assert told in one_sentence(done)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--device", "banana"], "--device banana is not a device"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--out", "/dev/null/x"], "/dev/null/x cannot be written, because /dev/null is no folder"),
        (["--seed", str(2**44)], "--seed 17592186044416: input should be less than"),
        (["--sae-seed", str(2**32)], "--sae-seed 4294967296: input should be less than"),
        (["--data", "demo:nosuch"], "demo:nosuch is not one of the demo's data"),
        (["--data", "~no_such_user_here/x.jsonl"], "is no path that can be opened"),
        (["--data", ""], "A name is empty where a file, a folder or a hub id is asked for"),
        (["--device", "mps"], "--device mps is not supported"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_one_sentence_before_any_work(
    given: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = rmscope_command("run", "--model", "none", "--data", "none.jsonl", "--out", "run", *given)
    assert told in one_sentence(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [["run", "a" * 5000], ["rank", "a" * 5000], ["doctor", "~no_such_user_here"]])
def test_a_place_that_cannot_be_is_one_sentence(given: list[str]) -> None:
    assert "is no path that can be opened" in one_sentence(rmscope_command(*given))


def test_a_column_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"[/bold]": "x", "[red]y": 1}\n')
    given = ["doctor", "none", "--data", str(path)]
    assert "its columns ([/bold], [red]y)" in one_sentence(rmscope_command(*given))
    assert "'[/b]'" in one_sentence(rmscope_command(*given, "--columns", "prompt=[/b]"))
    assert "[/bold]" in one_sentence(rmscope_command(*given, "--format", "[/bold]"))
