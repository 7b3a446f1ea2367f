"""A run on a small random PM, and what it leaves, by its bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rmscope.pairs.demo import demo_pairs
from rmscope.run.settings import RunConfig
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


def tables(folder: Path) -> dict[str, str]:
    """Every table and every weight of a run, by its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".parquet", ".safetensors") and "training" not in p.name
    }
