"""The stage of exact ablations on the confirm split: frozen features and frozen concepts, and their controls.

1. Which features fire in which response is counted by a forward pass.
2. Each is ablated on pairs where it fires, and where it fires hardest, also from the responses' endings alone; a concept at
   all of its sites at once. All ablations of a response share its clean run.
3. Beside them: on unrelated completions, and dense features set to their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, write_table
from rmscope.model.rendering import PairTokens
from rmscope.ranking import flags
from rmscope.ranking.candidates import firing_counts, pairs_a_prompt, strongest
from rmscope.ranking.concepts import members_of
from rmscope.run.data import RunData
from rmscope.run.screen import Tables, exact_effects, ordered

CONCEPTS = "concepts"
"""The name of the concepts' table beside those of the sites."""
ROW = ["pair", "side", "feature"]
PARTS = ("firing", "confirm", "unrelated", "mean")


def ablate(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``exact``, ``strong`` and ``controls`` of every site, and of all concepts in ``concepts/``."""
    c, confirming = run.config, run.of_split("confirm")
    firing = feature_firings(run, "firing", confirming, progress, key)
    firing[CONCEPTS] = concept_firings(run.frozen_concepts, firing)
    write_table(run.folder / CONCEPTS / "firing.parquet", firing[CONCEPTS].drop("kind"))
    fires = {name: ordered(run, table) for name, table in firing.items()}
    listed = {site: run.frozen(site)["feature"].to_list() for site in run.sites}
    listed[CONCEPTS] = run.frozen_concepts["concept"].to_list()
    prompts = {name: c.confirm_prompts if name == CONCEPTS else c.feature_prompts for name in listed}
    asked = {s: pairs_a_prompt(fires[s], listed[s], prompts[s], c.confirm_pairs) for s in listed}
    hardest = {s: strongest(fires[s], listed[s], prompts[s]) for s in listed}
    both = {s: pl.concat([asked[s].select(ROW), hardest[s].select(ROW)]) for s in listed}
    groups = {CONCEPTS: members_of(run.frozen_concepts)}
    effects = exact_effects(run, "confirm", key, both, progress, endings=True, groups=groups)
    tried, tokens = _unrelated_completions(run, asked)
    requests = {s: rows.with_columns(pl.lit("chosen").alias("side")) for s, rows in tried.items()}
    moved = exact_effects(run, "unrelated", key, requests, progress, tokens=tokens, groups=groups)
    ends = flags.endings(run.rm, run.tokens, run.ids, confirming)
    means = _to_mean(run, {site: asked[site] for site in run.sites}, progress, key)
    for name, effect in effects.items():
        folder = run.folder / CONCEPTS if name == CONCEPTS else run.folder / "effects" / name
        confirmed = effect.join(asked[name].select(ROW), on=ROW, how="semi", maintain_order="left")
        which = hardest[name].select(*ROW, "strong")
        strong = effect.drop("ending").join(which, on=ROW, how="inner", maintain_order="left")
        screened = [] if name == CONCEPTS else [pl.read_parquet(folder / "screened.parquet")]
        write_table(folder / "exact.parquet", pl.concat([*screened, confirmed.drop("ending")]))
        write_table(folder / "strong.parquet", strong)
        ending = flags.ending_features(confirmed, firing[name], ends)
        controls = (
            pl.DataFrame({"feature": listed[name]}, schema={"feature": pl.Int32})
            .join(firing_counts(fires[name], len(confirming)), on="feature", how="left")
            .with_columns(pl.col("prompts", "fire_pairs").fill_null(0), pl.col("feature").is_in(ending).alias("ending"))
            .join(flags.unrelated_share(confirmed, moved[name], tried[name]), on="feature", how="left")
        )
        if name in means:
            to_mean = means[name].group_by("feature").agg(pl.col("effect").mean().alias("to_mean"))
            controls = controls.join(to_mean, on="feature", how="left")
        write_table(folder / "controls.parquet", controls)
    for part in PARTS:
        run.on_disk.drop_parts(part, key)


def feature_firings(run: RunData, name: str, places: Sequence[int], progress: Progress, key: str) -> Tables:
    """Which features fire in the responses of some pairs, by forward passes; kept unit by unit under ``name``."""

    def make(unit: list[int], _within: Progress) -> Tables:
        return tables.firing_table(run.rm, run.saes, run.tokens, run.ids, unit)

    return run.on_disk.in_units(name, key, places, progress, make)


def concept_firings(concepts: pl.DataFrame, firing: Tables) -> pl.DataFrame:
    """Where concepts fire: pair, side, feature (the concept's number), effect (Σ_t of its activation), ending, kind."""
    schema = tables.SCHEMA | {"ending": pl.Float32}
    parts = [pl.DataFrame(schema=schema)]
    for number, site, features, weights in concepts.select("concept", "site", "features", "weights").iter_rows():
        own = pl.DataFrame({"feature": features, "weight": weights}, schema={"feature": pl.Int32, "weight": pl.Float64})
        total = [(pl.col(name) * pl.col("weight")).sum().alias(name) for name in ("effect", "ending")]
        by_response = firing[site].join(own, on="feature").group_by("pair", "side", "kind", maintain_order=True).agg(total)
        numbered = by_response.with_columns(pl.lit(number).alias("feature"))
        parts.append(numbered.select(pl.col(name).cast(dtype) for name, dtype in schema.items()))
    return pl.concat(parts)


def _unrelated_completions(run: RunData, asked: Tables) -> tuple[Tables, list[PairTokens]]:
    """(the pairs of each feature that are tried, the tokens of all pairs with unrelated completions on those)."""
    tried = {site: flags.first_pairs(rows) for site, rows in asked.items()}
    pairs, index = {i: run.pairs[i] for i in run.of_split("confirm")}, run.pair_set.index
    wanted = sorted({index[p] for rows in tried.values() for p in rows["pair"]})
    swapped = flags.unrelated(run.rm, pairs, run.prompts, wanted, run.config.seed)
    tokens, on = [swapped.get(i, t) for i, t in enumerate(run.tokens)], [run.ids[i] for i in swapped]
    return {site: rows.filter(pl.col("pair").is_in(on)) for site, rows in tried.items()}, tokens


def _to_mean(run: RunData, asked: Tables, progress: Progress, key: str) -> Tables:
    """Dense features set to their mean instead of 0, on the same responses."""
    statistics = run.feature_statistics
    dense = {s: rows.filter(pl.col("feature").is_in(statistics[s].having("dense"))) for s, rows in asked.items()}
    means = {site: statistics[site].f_mean for site in run.sites}
    wanted = tables.plan(dense, run.pair_set.index)

    def make(unit: list[int], _within: Progress) -> Tables:
        part = {p: wanted[p] for p in unit}
        return flags.mean_table(run.rm, run.saes, means, run.tokens, run.ids, part)

    return run.on_disk.in_units("mean", key, list(wanted), progress, make) or make([], progress)
