"""What ablating a feature does in A and in B, on the same fresh responses.

A response counts for a feature where it fires in its span in either PM, so that neither chooses the responses alone; where
it is silent in one of them, its effect there is exactly 0. Effects are exact ablations (METHOD), each in SD(Δr) of the PM
that it was measured in, over the same fresh pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, silent
from rmscope.ranking.ranking import pairs_a_prompt
from rmscope.studies.compare.activations import FIRING, KEY
from rmscope.studies.compare.models import Dictionary, HeldOut, Version

ABLATIONS = {**KEY, "pm": pl.String, **{c: t for c, t in tables.SCHEMA.items() if c != "kind"}}


def requested(firing: pl.DataFrame, read: Sequence[Dictionary], fresh: HeldOut, prompts: int, seed: int) -> pl.DataFrame:
    """The responses (of, site, pair, side, feature, prompt) in which each reported feature is ablated: one pair of each of
    at most ``prompts`` prompts, both of its sides where the feature fires on both."""
    parts = [pl.DataFrame(schema={**FIRING, "prompt": pl.String})]
    for d in read:
        rows = firing.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))
        picked = pairs_a_prompt(tables.with_order(rows, fresh.prompt_of, seed), d.reported, prompts)
        parts.append(picked.select(parts[0].columns))
    return pl.concat(parts)


def ablation_unit(
    versions: Mapping[str, Version],
    read: Sequence[Dictionary],
    fresh: HeldOut,
    asked: pl.DataFrame,
    unit: Sequence[int],
    progress: Progress = silent,
) -> dict[str, pl.DataFrame]:
    """``ablations``: the asked ablations of some pairs in each PM (``pm``: its letter), a row where the feature fires."""
    rows = asked.filter(pl.col("pair").is_in([fresh.ids[i] for i in unit]))
    parts = [pl.DataFrame(schema=ABLATIONS)]
    for of in sorted({d.of for d in read}):
        saes = {d.site: d.sae for d in read if d.of == of}
        wanted = tables.plan({s: rows.filter((pl.col("of") == of) & (pl.col("site") == s)) for s in saes}, fresh.index)
        for pm, version in versions.items():
            made = tables.ablation_table(version.rm, saes, fresh.tokens, fresh.ids, wanted, progress)
            for site, table in made.items():
                named = table.with_columns(pl.lit(of).alias("of"), pl.lit(site).alias("site"), pl.lit(pm).alias("pm"))
                parts.append(named.select(parts[0].columns))
    return {"ablations": pl.concat(parts)}


def paired(asked: pl.DataFrame, ablations: pl.DataFrame, sd: Mapping[str, float]) -> pl.DataFrame:
    """A row a feature and prompt (of, site, feature, prompt): the mean effect in A (``a``), in B (``b``) and in each
    other PM of ``sd`` over the same responses, in SD(Δr) of each PM."""
    rows, pms = asked, pl.col(*sd)
    for pm in sd:
        effect = (pl.col("effect").cast(pl.Float64) / sd[pm]).alias(pm)
        here = ablations.filter(pl.col("pm") == pm).select("of", "site", "pair", "side", "feature", effect)
        rows = rows.join(here, on=["of", "site", "pair", "side", "feature"], how="left")
    return (
        rows.with_columns(pms.fill_null(0.0))
        .group_by("of", "site", "feature", "prompt")
        .agg(pms.mean())
        .sort("of", "site", "feature", "prompt")
    )
