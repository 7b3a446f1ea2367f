"""Bytes on disk and peak memory of effect tables at n and 4n pairs, SAEs of 32,768 features.

usage: effects_storage.py [--pairs 500]

The numbers are random: effects and masses are normal, which compresses worse than real ones do, and 1,500 features are
active in a response (a span of 100 tokens at k 64 has 6,400 entries, of which features share many). Tables are written as a
run writes them: a unit of 64 pairs at a time, then one file. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch

from rmscope.effects import tables
from rmscope.io import NoDisplay, Progress, silent
from rmscope.pairs.pair import SIDES
from rmscope.run.folder import RunFolder

M, ACTIVE = 32_768, 1_500


def unit_table(unit: list[int], ids: list[str]) -> pl.DataFrame:
    """A table of estimates of a unit of pairs."""
    rng = np.random.default_rng(unit[0])
    rows = []
    for pair in unit:
        for side in SIDES:
            feature = torch.from_numpy(np.sort(rng.choice(M, ACTIVE, replace=False)))
            effect, mass = (torch.from_numpy(rng.normal(size=ACTIVE).astype(np.float32)) for _ in range(2))
            rows.append((pair, side, feature, {"effect": effect, "mass": mass}))
    return tables._frame(ids, rows, "ablation_estimate")


def write(pairs: int) -> dict[str, float]:
    """Builds the table of ``pairs`` pairs as a run does; its size and this process's peak memory."""
    ids = [f"harmless-base/test.jsonl.gz:{i}" for i in range(pairs)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, path = RunFolder(Path(scratch) / "run", NoDisplay()), Path(scratch) / "estimated.parquet"

        def make(unit: list[int], _within: Progress) -> dict[str, pl.DataFrame]:
            return {"estimated": unit_table(unit, ids)}

        folder.stream_units("estimate", "key", range(pairs), silent, make, lambda _name: path)
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"pairs": pairs, "rows": rows, "megabytes": size / 1e6, "peak_rss_megabytes": peak / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(write(args.pairs)))
        return
    found = []
    for pairs in (args.pairs, 4 * args.pairs):
        command = [sys.executable, __file__, "--child", "--pairs", str(pairs)]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(json.dumps({"case": "effects storage", **found[-1]}), flush=True)
    ratio = found[1]["peak_rss_megabytes"] / found[0]["peak_rss_megabytes"]
    print(json.dumps({"case": "memory at 4n over n", "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
