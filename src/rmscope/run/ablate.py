"""The stage of exact ablations: screened features on the fit split, frozen lists and controls on the confirm split.

1. The estimate proposes features up and down; they and a stratified sample of others are ablated on fit responses.
2. The lists are frozen by those effects, with their signs.
3. The frozen features are ablated on confirm pairs where they fire, and where they fire hardest.
4. Beside them: from the responses' endings alone, on unrelated completions, and set to their mean where they are dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, write_table
from rmscope.model.rendering import PairTokens
from rmscope.ranking import flags
from rmscope.ranking.candidates import (
    candidates,
    firing_counts,
    first_responses,
    freeze,
    pairs_a_prompt,
    preference_signs,
    strongest,
)
from rmscope.ranking.estimate_quality import quality_sample
from rmscope.run.data import RunData

Tables = dict[str, pl.DataFrame]
"""A table per site."""
PARTS = ("fit", "firing", "confirm", "strong", "unrelated", "mean")


def ablate(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``exact``, ``strong``, ``frozen`` and ``quality_sample`` of every site."""
    c = run.config
    requests: Tables = {}
    samples: Tables = {}
    signs: Tables = {}
    screened: dict[str, list[int]] = {}
    for site in run.sites:
        table = _ordered(run, run.effects(site, "estimated"))
        proposed = candidates(table, c.screen, c.others, c.seed)
        samples[site] = quality_sample(table, c.quality_responses, c.seed)
        screened[site] = proposed["up"] + proposed["down"]
        rows = first_responses(table, [*screened[site], *proposed["others"]], c.responses)
        columns = ["pair", "side", "feature"]
        requests[site] = pl.concat([rows.select(columns), samples[site].select(columns)])
        signs[site] = preference_signs(table)
    fit = _ablations(run, "fit", key, requests, progress)
    frozen: Tables = {}
    for site in run.sites:
        rows = first_responses(_ordered(run, fit[site]), screened[site], c.responses)
        list_ = freeze(rows, screened[site], c.frozen // len(run.sites))
        frozen[site] = list_.join(signs[site], on="feature", how="left")
    confirmed = _confirm(run, frozen, progress, key)
    for site in run.sites:
        folder = run.folder / "effects" / site
        joined = samples[site].join(fit[site], on=["pair", "side", "feature"], how="inner")
        columns = ["pair", "side", "feature", "prompt", "estimate", "effect", "weight"]
        write_table(folder / "quality_sample.parquet", joined.select(columns))
        write_table(folder / "exact.parquet", pl.concat([fit[site], confirmed[site].drop("ending")]))
    for part in PARTS:
        run.on_disk.drop_parts(part, key)


def _confirm(run: RunData, frozen: Tables, progress: Progress, key: str) -> Tables:
    """Exact ablations of the frozen lists on the confirm split, and the controls; writes each list with its figures."""
    c, confirming = run.config, run.of_split("confirm")
    firing = run.on_disk.in_units(
        "firing",
        key,
        confirming,
        progress,
        lambda unit, within: tables.firing_table(run.rm, run.saes, run.tokens, run.ids, unit),
    )
    for site, table in firing.items():
        write_table(run.folder / "effects" / site / "firing.parquet", table)
    ordered = {site: _ordered(run, firing[site]) for site in run.sites}
    listed = {site: list_["feature"].to_list() for site, list_ in frozen.items()}
    asked = {s: pairs_a_prompt(ordered[s], listed[s], c.confirm_prompts, c.confirm_pairs) for s in run.sites}
    confirmed = _ablations(run, "confirm", key, asked, progress, endings=True)
    _strong(run, {s: strongest(ordered[s], listed[s], c.confirm_prompts) for s in run.sites}, key, progress)
    ends = flags.endings(run.rm, run.tokens, run.ids, confirming)
    unrelated = _unrelated(run, asked, confirmed, progress, key)
    means = _to_mean(run, asked, progress, key)
    for site, list_ in frozen.items():
        ending = flags.ending_features(confirmed[site], firing[site], ends)
        to_mean = means[site].group_by("feature").agg(pl.col("effect").mean().alias("to_mean"))
        list_ = (
            list_.join(firing_counts(ordered[site], len(confirming)), on="feature", how="left")
            .with_columns(pl.col("prompts", "fire_pairs").fill_null(0), pl.col("feature").is_in(ending).alias("ending"))
            .join(unrelated[site], on="feature", how="left")
            .join(to_mean, on="feature", how="left")
        )
        write_table(run.folder / "effects" / site / "frozen.parquet", list_)
    return confirmed


def _strong(run: RunData, asked: Tables, key: str, progress: Progress) -> None:
    """Exact ablations where the frozen features fire hardest."""
    for site, table in _ablations(run, "strong", key, asked, progress).items():
        which = asked[site].select("pair", "side", "feature", "strong")
        joined = table.join(which, on=["pair", "side", "feature"], how="left", maintain_order="left")
        write_table(run.folder / "effects" / site / "strong.parquet", joined)


def _unrelated(run: RunData, asked: Tables, confirmed: Tables, progress: Progress, key: str) -> Tables:
    """How far the frozen features move unrelated completions of the prompts that they were confirmed on."""
    tried, tokens = unrelated_completions(run, asked)
    requests = {site: rows.with_columns(pl.lit("chosen").alias("side")) for site, rows in tried.items()}
    moved = _ablations(run, "unrelated", key, requests, progress, tokens=tokens)
    return {site: flags.unrelated_share(confirmed[site], moved[site], tried[site]) for site in run.sites}


def unrelated_completions(run: RunData, asked: Tables) -> tuple[Tables, list[PairTokens]]:
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


def _ordered(run: RunData, table: pl.DataFrame) -> pl.DataFrame:
    return tables.with_order(table, run.prompts, run.config.seed)


def _ablations(
    run: RunData,
    name: str,
    key: str,
    requests: Mapping[str, pl.DataFrame],
    progress: Progress,
    endings: bool = False,
    tokens: Sequence[PairTokens] | None = None,
) -> Tables:
    """The asked ablations (pair, side, feature) of every site, kept unit by unit under ``name``."""
    wanted = tables.plan(requests, run.pair_set.index)

    def make(unit: list[int], within: Progress) -> Tables:
        part = {p: wanted[p] for p in unit}
        return tables.ablation_table(run.rm, run.saes, tokens or run.tokens, run.ids, part, within, endings)

    return run.on_disk.in_units(name, key, list(wanted), progress, make) or make([], progress)
