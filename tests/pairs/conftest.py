"""A reader of rows that are written to a file first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmscope.pairs.pair import Pair
from rmscope.pairs.readers import ReadReport, load_pairs
from tests.pairs.files import write


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Pair], ReadReport]]:
    def reader(*rows: dict[str, Any], name: str = "data.jsonl", **options: Any) -> tuple[list[Pair], ReadReport]:
        report = ReadReport()
        return load_pairs(write(tmp_path / name, list(rows)), report=report, **options), report

    return reader
