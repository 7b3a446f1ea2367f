"""A run folder: what killed writes left is swept, and nothing else; several processes share the units of a stage."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.io import NoDisplay, Progress, silent
from rmscope.ranks import Ranks
from rmscope.run.folder import RunFolder

LEFT = [
    ".run.yaml.abc.tmp", ".scores.parquet.x_1.tmp", ".report.html.q.tmp", ".concepts.parquet.r.tmp",
    "saes/diff.2/.sae_weights.safetensors.q.tmp", "saes/seeds/1/diff.2/.cfg.json.q.tmp",
    ".parts/score-1/scores/.00001.parquet.k.tmp", "effects/a/.exact.parquet.z.tmp", "evidence/.tokens.parquet.z.tmp",
    "evidence/.examples.diff.2.parquet.z.tmp", "activations/diff.2/.shard-00000.safetensors.a.tmp",
    "activations/diff.2/.manifest.json.a.tmp",
]  # fmt: skip
OTHERS = [
    "evidence/.jailbreak.json.a.tmp",
    ".parts/jailbreak-1/rows/.00001.parquet.k.tmp",
    "effects/a/.explained.json.q.tmp",
    "evidence/experiments/.x.json.a.tmp",
    "my.tmp",
    "notes/.a.b.tmp",
    "saes/x.tmp",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in [*LEFT, *OTHERS]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half of it")
    (tmp_path / "run.yaml").write_text("config: {}\n")
    return tmp_path


def test_what_killed_writes_of_stages_left_is_swept_and_nothing_else(folder: Path) -> None:
    with RunFolder(folder, NoDisplay()).locked():
        assert [name for name in LEFT if (folder / name).exists()] == []
        assert [name for name in OTHERS if not (folder / name).exists()] == []


def test_a_folder_that_is_only_read_keeps_all(folder: Path) -> None:
    RunFolder(folder, NoDisplay())
    assert all((folder / name).exists() for name in [*LEFT, *OTHERS])


def test_ranks_share_the_units_and_each_is_made_once(tmp_path: Path) -> None:
    items, together = list(range(300)), threading.Barrier(2)
    made: dict[int, list[int]] = {0: [], 1: []}

    class Thread(Ranks):
        """A rank that is a thread."""

        def wait(self) -> None:
            together.wait(60)

    def work(rank: int) -> pl.DataFrame:
        folder = RunFolder(tmp_path / "run", NoDisplay())
        folder.ranks = Thread(rank, 2)

        def make(unit: list[int], _progress: Progress) -> dict[str, pl.DataFrame]:
            made[rank].append(unit[0])
            return {"squares": pl.DataFrame({"item": unit, "square": [i * i for i in unit]})}

        return folder.in_units("squares", "key", items, silent, make)["squares"]

    with ThreadPoolExecutor(2) as threads:
        tables = list(threads.map(work, (0, 1)))
    assert made == {0: [0, 128, 256], 1: [64, 192]}
    for table in tables:
        assert table.rows() == [(i, i * i) for i in items]


def test_a_unit_that_another_process_wrote_and_that_is_not_seen_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Ranks):
        def wait(self) -> None:
            pass

    monkeypatch.setattr("rmscope.run.folder.LATE", 0.5)
    folder = RunFolder(tmp_path / "run", NoDisplay())
    folder.ranks = Deaf(1, 2)
    with pytest.raises(InputError, match=r"00000\.json, which another process wrote, is not to be seen here"):
        folder.in_units("squares", "key", list(range(100)), silent, lambda unit, _: {"t": pl.DataFrame({"item": unit})})
