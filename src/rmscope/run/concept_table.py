"""The table of concepts: rank and test from the confirm split, values from the measure split."""

from __future__ import annotations

import polars as pl

HELD = 2 / 3
"""The share of the dictionaries in which a concept must hold."""
VALUES = ("effect", "low", "high", "n")


def concept_table(ranked: pl.DataFrame, directions: pl.DataFrame, measured: pl.DataFrame) -> pl.DataFrame:
    """The ranking of concepts with their direction null and their values on the measure split.

    What does not beat its null gets the flag ``direction`` and is not reported. What holds in fewer than two of three SAE
    seeds gets the flag ``seeds``. ``mean_effect``, ``ci_low``, ``ci_high`` and ``n`` (of a concept with the flag ``strong``:
    ``strong_effect``, ``strong_low``, ``strong_high``, ``n_strong``) become those of the measure split where it was measured
    there. Those of the confirm split, from which it was chosen, are in ``confirm_effect``, ``confirm_low``, ``confirm_high``
    and ``confirm_n``.
    """
    table = ranked
    for part in (directions, measured):
        table = table.join(part, on="concept", how="left", maintain_order="left")
    lost = (pl.col("own").abs() <= pl.max_horizontal("null_random", "null_real")).fill_null(False)
    is_measured, strong = pl.col("measured").is_not_null(), pl.col("flags").list.contains("strong")
    unstable = (pl.col("seeds_held") < HELD * (1 + pl.col("seed_effects").list.len())).fill_null(False)
    marks = [pl.when(rows).then(pl.lit(flag)) for flag, rows in (("direction", lost), ("seeds", is_measured & unstable))]
    flags = pl.concat_list("flags", *marks).list.drop_nulls()
    fresh = ("measured", "measured_low", "measured_high", "n_measured")
    plain, hard = ("mean_effect", "ci_low", "ci_high", "n"), ("strong_effect", "strong_low", "strong_high", "n_strong")
    shown = [
        pl.when(is_measured & rows).then(new).otherwise(old).alias(old)
        for names, rows in ((plain, ~strong), (hard, strong))
        for new, old in zip(fresh, names, strict=True)
    ]
    before = [
        pl.when(strong).then(b).otherwise(a).alias(f"confirm_{name}") for name, a, b in zip(VALUES, plain, hard, strict=True)
    ]
    return (
        table.with_columns(*before)
        .with_columns(*shown, flags.alias("flags"), (pl.col("reported") & ~lost).alias("reported"))
        .drop("own", *fresh)
    )
