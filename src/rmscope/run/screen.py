"""The stage of the screen: features that the estimate proposes are ablated on the fit split, and the lists are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from rmscope.effects import tables
from rmscope.effects.requests import Groups
from rmscope.io import Progress, write_table
from rmscope.model.rendering import PairTokens
from rmscope.ranking.candidates import candidates, first_responses, freeze, preference_signs
from rmscope.ranking.estimate_quality import quality_sample
from rmscope.run.data import RunData

Tables = dict[str, pl.DataFrame]
"""A table per site."""


def screen(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``screened``, ``frozen``, ``others`` and ``quality_sample`` of every site.

    The estimate proposes features up and down. They, a stratified sample of others, and the sample that measures the quality
    of the estimate are ablated on fit responses. The lists are frozen by those effects, with their signs. The others tell
    what the estimate misses.
    """
    c = run.config
    requests: Tables = {}
    samples: Tables = {}
    signs: Tables = {}
    screened: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for site in run.sites:
        table = ordered(run, run.effects(site, "estimated"))
        proposed = candidates(table, c.screen, c.others, c.seed)
        samples[site] = quality_sample(table, c.quality_responses, c.seed)
        screened[site], others[site] = proposed["up"] + proposed["down"], proposed["others"]
        rows = first_responses(table, [*screened[site], *others[site]], c.responses)
        columns = ["pair", "side", "feature"]
        requests[site] = pl.concat([rows.select(columns), samples[site].select(columns)])
        signs[site] = preference_signs(table)
    fit = exact_effects(run, "fit", key, requests, progress)
    for site in run.sites:
        folder = run.folder / "effects" / site
        rows = first_responses(ordered(run, fit[site]), screened[site], c.responses)
        list_ = freeze(rows, screened[site], c.frozen // len(run.sites))
        write_table(folder / "frozen.parquet", list_.join(signs[site], on="feature", how="left"))
        rest = first_responses(ordered(run, fit[site]), others[site], c.responses)
        write_table(folder / "others.parquet", freeze(rest, others[site], len(others[site])).drop("sign"))
        joined = samples[site].join(fit[site], on=["pair", "side", "feature"], how="inner")
        sample = ["pair", "side", "feature", "prompt", "estimate", "effect", "weight"]
        write_table(folder / "quality_sample.parquet", joined.select(sample))
        write_table(folder / "screened.parquet", fit[site])
    run.on_disk.drop_parts("fit", key)


def ordered(run: RunData, table: pl.DataFrame) -> pl.DataFrame:
    """The table with the prompt of each row, and its place in the common random order of responses."""
    return tables.with_order(table, run.prompts, run.config.seed)


def exact_effects(
    run: RunData,
    name: str,
    key: str,
    requests: Mapping[str, pl.DataFrame],
    progress: Progress,
    endings: bool = False,
    tokens: Sequence[PairTokens] | None = None,
    groups: Mapping[str, Groups] | None = None,
) -> Tables:
    """The requested ablations (pair, side, feature), kept unit by unit under ``name``.

    ``tokens`` replaces the pairs' own texts. ``groups`` is that of :func:`rmscope.effects.tables.ablation_table`.
    """
    wanted = tables.plan(requests, run.pair_set.index)

    def make(unit: list[int], within: Progress) -> Tables:
        part = {p: wanted[p] for p in unit}
        return tables.ablation_table(run.rm, run.saes, tokens or run.tokens, run.ids, part, within, endings, groups)

    return run.on_disk.in_units(name, key, list(wanted), progress, make) or make([], progress)
