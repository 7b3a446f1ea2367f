"""Exact ablations and frozen lists made up for the tests of the ranking."""

from __future__ import annotations

import numpy as np
import polars as pl

from rmscope.ranking.confirm import confirm


def measured(
    effects: dict[int, np.ndarray],
    lengths: np.ndarray | None = None,
    side: str = "chosen",
    deltas: np.ndarray | None = None,
) -> pl.DataFrame:
    n = max(values.size for values in effects.values())
    lengths = np.arange(n) % 7 - 3 if lengths is None else lengths
    deltas = np.random.default_rng(5).normal(size=n) if deltas is None else deltas
    rows = [
        (f"pair{i}", f"p{i}", side, f, float(e), float(deltas[i]), int(lengths[i]))
        for f, values in effects.items()
        for i, e in enumerate(values)
    ]
    columns = ["pair", "prompt", "side", "feature", "effect", "delta", "length_difference"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def frozen(
    signs: dict[int, int], prompts: dict[int, int] | None = None, sign_diff: int = 1, fire_pairs: float = 1.0
) -> pl.DataFrame:
    rows = [(f, sign, sign_diff, (prompts or {}).get(f, 40), fire_pairs) for f, sign in signs.items()]
    kinds = {"feature": pl.Int64, "sign": pl.Int64, "sign_diff": pl.Int64, "prompts": pl.Int64, "fire_pairs": pl.Float64}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def ranked(list_: pl.DataFrame, exact: pl.DataFrame, sd: float = 1.0, seed: int = 0) -> dict[int, dict]:
    table = confirm({"s": list_}, {"s": exact}, sd, seed)["s"]
    return {row["feature"]: row for row in table.iter_rows(named=True)}
