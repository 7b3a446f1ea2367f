"""The table of docs/howto/plan.md is that which benchmarks/plans.py gives."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_page_is_current(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"), run_name="imported")
    page = (ROOT / "docs" / "howto" / "plan.md").read_text("utf-8")
    assert script["table"](script["plans"](tmp_path)) in page, "run python benchmarks/plans.py, and put its table there"
