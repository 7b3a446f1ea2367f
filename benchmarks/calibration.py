"""How often a run's ranking reports anything when there is nothing to find, on the run's own exact ablations.

labels: in each pair a coin decides whether chosen and rejected change places: in the estimates that freeze the signs, in the
exact ablations and in Δr. Everything from there to ``prefers`` is done again. What drives reward has no label in it, so its
list and its tests stay as they are, and it has a null of its own.
rewards: all effects of a response are multiplied by one coin's sign, as if the reward of that response were turned over.
Everything from freezing the signs to ``reported`` is done again.

A run counts when a single feature passes. The bound .05 SD(Δr) keeps most of the noise out by itself, so both are also run
with the bound at 0, where the test alone keeps noise out of the report.

usage: calibration.py RUN_FOLDER [DRAWS]        prints one JSON line per case
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import polars as pl
from scipy import stats

from rmscope.ranking.candidates import preference_signs
from rmscope.ranking.confirm import BOUND, confirm
from rmscope.run.run import Run

Tables = dict[str, pl.DataFrame]


def coins(pairs: pl.Series, rng: np.random.Generator) -> pl.DataFrame:
    """One row per pair and side: the pair's sign ``label``, which both sides share, and the side's own sign ``reward``."""
    pairs = pairs.unique().sort()
    label, rewards = rng.choice([-1, 1], pairs.len()), rng.choice([-1, 1], (2, pairs.len()))
    parts = [
        pl.DataFrame({"pair": pairs, "side": side, "label": label, "reward": reward})
        for side, reward in zip(("chosen", "rejected"), rewards, strict=True)
    ]
    return pl.concat(parts)


def labels(table: pl.DataFrame, drawn: pl.DataFrame) -> pl.DataFrame:
    """Chosen and rejected change places where the pair's coin says so."""
    turned, other = (
        pl.col("label") < 0,
        pl.when(pl.col("side") == "chosen").then(pl.lit("rejected")).otherwise(pl.lit("chosen")),
    )
    signed = [pl.col(c) * pl.col("label") for c in ("delta", "length_difference") if c in table.columns]
    table = table.join(drawn, on=["pair", "side"])
    return table.with_columns(pl.when(turned).then(other).otherwise(pl.col("side")).alias("side"), *signed)


def rewards(table: pl.DataFrame, drawn: pl.DataFrame) -> pl.DataFrame:
    """All effects of a response change sign where its coin says so."""
    return table.join(drawn, on=["pair", "side"]).with_columns(pl.col("effect") * pl.col("reward"))


def signs_again(frozen: pl.DataFrame, estimates: pl.DataFrame, fit: pl.DataFrame) -> pl.DataFrame:
    """The list with new frozen signs: those of the preference from estimates, those of the reward from exact ablations."""
    ablation = fit.group_by("feature").agg(pl.col("effect").sum().sign().cast(pl.Int8).alias("sign"))
    counts = frozen.select("feature", "prompts", "fire_pairs")
    return counts.join(ablation, on="feature").join(preference_signs(estimates), on="feature")


def reports(
    run: Run, turn: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame], column: str, bound: float, draws: int
) -> int:
    """In how many of ``draws`` runs anything passes."""
    rng, found = np.random.default_rng(0), 0
    effects = {s: run.folder / "effects" / s for s in run.sites}
    frozen = {s: pl.read_parquet(f / "controls.parquet") for s, f in effects.items()}
    confirmed, strong = ({s: run.confirmed(s, name) for s in run.sites} for name in ("exact", "strong"))
    estimates, fit = {}, {}
    for site, folder in effects.items():
        mine, columns = frozen[site]["feature"].implode(), ["pair", "side", "feature", "effect"]
        estimates[site] = pl.read_parquet(folder / "estimated.parquet", columns=columns).filter(
            pl.col("feature").is_in(mine)
        )
        exact = pl.read_parquet(folder / "exact.parquet", columns=columns)
        on_fit = ~pl.col("pair").is_in(confirmed[site]["pair"].implode())
        fit[site] = exact.filter(on_fit & pl.col("feature").is_in(mine))
    for _ in range(draws):
        drawn = coins(run.scores["pair"], rng)
        lists = {s: signs_again(frozen[s], turn(estimates[s], drawn), turn(fit[s], drawn)) for s in run.sites}
        again, hardest = ({s: turn(t, drawn) for s, t in tables.items()} for tables in (confirmed, strong))
        ranked = confirm(lists, again, run.sd, run.config.seed, bound, hardest)
        found += any(bool(table[column].any()) for table in ranked.values())
    return found


def main(folder: str, draws: int = 200) -> None:
    run = Run.open(folder)
    for turn, column in ((labels, "prefers"), (rewards, "reported")):
        for bound in (BOUND, 0.0):
            found = reports(run, turn, column, bound, draws)
            high = float(stats.beta.ppf(0.95, found + 1, draws - found)) if found < draws else 1.0
            row = {"case": turn.__name__, "bound_sd": bound, "draws": draws, "runs_that_report": found}
            print(json.dumps(row | {"share": found / draws, "share_upper_95": round(high, 4)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
