"""A run on a small random PM, and what it leaves, by its bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl

from rmscope.io import silent, write_table
from rmscope.pairs.demo import demo_pairs
from rmscope.run.collect import collect
from rmscope.run.measure import measure
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig, read_record, write_record
from rmscope.sae import SaeConfig


def settings(pm: str, out: Path, **changes: Any) -> RunConfig:
    """On a CPU unless told: there a run gives the same bytes again."""
    data = Path(pm) / "pairs.jsonl"
    if not data.is_file():
        rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in demo_pairs(300)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        model=pm, data=str(data), out=out, sae=SaeConfig(d_sae=96, k=6, tokens=8192, batch_size=512),
        screen=12, others=8, responses=4, quality_responses=6, frozen=16, confirm_prompts=8,
        **{"limit": 300, "ledger_pairs": 8, "ledger_halvings": 1, "device": "cpu", **changes},
    )  # fmt: skip


def run_with_concepts(pm: str, out: Path, **changes: Any) -> None:
    """A random PM has no concepts to report, so the tables say that all are, before the evidence is made."""
    Run.create(settings(pm, out, **{"limit": 200, **changes})).go()
    (out / "report.html").unlink()
    directions = pl.read_parquet(out / "concepts" / "directions.parquet")
    nulls = directions.with_columns(own=pl.lit(1.0), null_random=pl.lit(0.0), null_real=pl.lit(0.0))
    write_table(out / "concepts" / "directions.parquet", nulls)
    concepts = pl.read_parquet(out / "concepts.parquet")
    none = pl.Series("flags", [[]] * concepts.height, dtype=pl.List(pl.String))
    write_table(out / "concepts.parquet", concepts.with_columns(pl.lit(True).alias("reported"), none))
    forget_checksums(out)
    measure(Run.open(out), silent, "again")
    run = Run.open(out)
    collect(run, silent, "again")
    run.report()


def forget_checksums(folder: Path) -> None:
    """After a test has rewritten files of a finished run: they would count as damaged."""
    write_record(folder, {**read_record(folder), "files": {}})


def tables(folder: Path) -> dict[str, str]:
    """Every table and every weight of a run, by its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".parquet", ".safetensors") and "training" not in p.name
    }
