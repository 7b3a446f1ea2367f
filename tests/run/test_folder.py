"""What killed writes left in a run folder is gone once the folder is held again; nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmscope.io import NoDisplay
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
