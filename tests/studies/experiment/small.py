"""A small run folder as studies read it: a random PM, scores, activations and SAEs, and a ranking written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rmscope.io import silent
from rmscope.run.run import Run
from rmscope.run.stages import harvest, score
from tests.model.small import saved_pm, small_sae

SITES = ["resid_post.1", "resid_post.2"]
FEATURES = 6
"""Reported features per site, of even sign + and of odd sign -."""


def saved_inputs(folder: Path) -> tuple[str, str]:
    """A PM and a file of 40 pairs, one per prompt."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i} in the small house. Thanks!", "rejected": "I don't know. Wait."}
        for i in range(40)
    ]
    folder.mkdir(exist_ok=True)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return saved_pm(folder / "pm"), str(data)


def small_run(folder: Path, sites: Sequence[str] = SITES) -> Run:
    """The run, with everything but a ranking."""
    pm, data = saved_inputs(folder)
    run = Run.create(model=pm, data=data, out=folder / "run", sites=list(sites), device="cpu")
    run.on_disk.open({"model": run.rm.identity, "data": "pairs"}, run.config.model_dump(mode="json"), run.sites)
    score(run, silent, "key")
    harvest(run, silent, "key")
    for seed, site in enumerate(sites):
        small_sae(m=24, k=6, seed=seed).save(run.folder / "saes" / site)
    return run


def write_ranking(run: Run, site: str, reported: int = FEATURES) -> None:
    """A table of features, the first of them reported, all with a mean effect of ± .1."""
    n = FEATURES + 2
    columns = {
        "feature": list(range(n)),
        "rank": list(range(1, n + 1)),
        "reported": [j < reported for j in range(n)],
        "mean_effect": [0.1 if j % 2 == 0 else -0.1 for j in range(n)],
        "flags": [["lexical"] if j == 0 else [] for j in range(n)],
    }
    path = run.folder / "features" / f"{site}.parquet"
    path.parent.mkdir(exist_ok=True)
    pl.DataFrame(columns, schema_overrides={"flags": pl.List(pl.String)}).write_parquet(path)
