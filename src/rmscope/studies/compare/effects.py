"""What ablating a feature does in A and in B, on the same fresh responses.

A response counts for a feature where the feature fires in its span in either PM, so that neither PM chooses the responses
alone. Where it is silent in one of them, its effect there is exactly 0. Effects are exact ablations, each in SD(Δr) of the
PM in which it was measured, over the same fresh pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, silent
from rmscope.ranking.ranking import pairs_a_prompt
from rmscope.studies.compare.activations import FIRING, KEY
from rmscope.studies.compare.held_out import HeldOut
from rmscope.studies.compare.models import ComparedModel, Dictionary

ABLATIONS = {**KEY, "pm": pl.String, **{c: t for c, t in tables.SCHEMA.items() if c != "kind"}}


def ablation_requests(
    firing: pl.DataFrame, read: Sequence[Dictionary], held_out: HeldOut, prompts: int, seed: int
) -> pl.DataFrame:
    """The responses in which each reported feature is ablated: of, site, pair, side, feature, prompt.

    Each feature gets one pair of each of at most ``prompts`` prompts, with both sides where it fires on both.
    """
    parts = [pl.DataFrame(schema={**FIRING, "prompt": pl.String})]
    for d in read:
        rows = firing.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))
        picked = pairs_a_prompt(tables.with_order(rows, held_out.prompt_of, seed), d.reported, prompts)
        parts.append(picked.select(parts[0].columns))
    return pl.concat(parts)


def ablation_unit(
    models: Mapping[str, ComparedModel],
    read: Sequence[Dictionary],
    held_out: HeldOut,
    requests: pl.DataFrame,
    unit: Sequence[int],
    progress: Progress = silent,
) -> dict[str, pl.DataFrame]:
    """``ablations``: requested ablations of some pairs in each PM (``pm``: its letter), one row where a feature fires."""
    rows = requests.filter(pl.col("pair").is_in([held_out.ids[i] for i in unit]))
    parts = [pl.DataFrame(schema=ABLATIONS)]
    for of in sorted({d.of for d in read}):
        saes = {d.site: d.sae for d in read if d.of == of}
        wanted = tables.plan({s: rows.filter((pl.col("of") == of) & (pl.col("site") == s)) for s in saes}, held_out.index)
        for pm, model in models.items():
            by_site = tables.ablation_table(model.rm, saes, held_out.tokens, held_out.ids, wanted, progress)
            for site, table in by_site.items():
                named = table.with_columns(pl.lit(of).alias("of"), pl.lit(site).alias("site"), pl.lit(pm).alias("pm"))
                parts.append(named.select(parts[0].columns))
    return {"ablations": pl.concat(parts)}


def pair_effects(requests: pl.DataFrame, ablations: pl.DataFrame, sd: Mapping[str, float]) -> pl.DataFrame:
    """One row per feature and prompt (of, site, feature, prompt): the mean effect over the same responses in each PM of
    ``sd`` (a, b, and c for a control), in SD(Δr) of that PM."""
    rows, pms = requests, pl.col(*sd)
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
