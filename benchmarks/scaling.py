"""How much faster two processes of one thread each do the shared stages of a run than one process of one thread.

Prints one JSON line per stage: seconds alone, seconds together, and their ratio. Every process has one core of its own, so
the script needs two quiet cores. The pairs fill whole units of 64 on both processes; with fewer, one waits for the other.

usage: scaling.py OUT [--pairs 512]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

STAGES = ("score", "harvest", "train", "estimate", "screen", "ablate", "measure", "decompose")
SETTINGS = {
    "model": "zoo:planted", "data": "demo:planted", "study": "difference", "blocks": 2, "diff_features": 64,
    "diff_tokens": 200_000, "screen": 20, "others": 0, "responses": 10, "quality_responses": 10, "frozen": 40,
    "concepts": 12, "feature_prompts": 20, "confirm_prompts": 40, "null_prompts": 4, "measure_prompts": 20,
    "seeds": 1, "ledger_pairs": 0,
}  # fmt: skip
"""A small run of the demo's PM."""


def seconds(out: Path, pairs: int, processes: int) -> dict[str, float]:
    """Seconds of each stage of a run by some processes."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**SETTINGS, "limit": pairs, "out": str(out)}))
    alone = [sys.executable, "-m"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*(alone if processes == 1 else together), "rmscope.cli", "run", str(config)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    stages = yaml.safe_load((out / "run.yaml").read_text("utf-8"))["stages"]
    return {name: stages[name]["seconds"] for name in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=512)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    one, two = (seconds(args.out / f"by{n}", args.pairs, n) for n in (1, 2))
    for name in STAGES:
        print(
            json.dumps({"stage": name, "alone": one[name], "together": two[name], "ratio": round(one[name] / two[name], 2)})
        )


if __name__ == "__main__":
    main()
