"""The stage of the direction null: beside the ablation of each reported concept, moves of the same size in other directions.

Where other directions move the reward as much, the tokens matter and the direction does not. Such concepts are told apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from rmscope.effects.ablation import at_site, clean_runs
from rmscope.effects.directions import DRAWS, effects_along, random_directions, real_directions
from rmscope.io import Progress, write_table
from rmscope.model.site_names import whole_site
from rmscope.ranking.concepts import members_of
from rmscope.run.data import RunData

PERCENTILE = 95.0
"""A concept beats its null where its mean effect is larger than this percentile of the other directions'."""
KINDS = ("random", "real")
ROW: dict[str, Any] = {
    "concept": pl.Int32, "pair": pl.String, "side": pl.String, "effect": pl.Float64, "along": pl.List(pl.Float64),
}  # fmt: skip
SCHEMA: dict[str, Any] = {
    "concept": pl.Int32, "own": pl.Float64, "null_random": pl.Float64, "null_real": pl.Float64, "n_null": pl.Int32,
}  # fmt: skip


def directions(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``concepts/directions.parquet``: concept, own (its mean effect on these prompts), the null of each kind, and
    the number of prompts."""
    ranked = run.ranked_concepts.filter("reported")
    rows = _responses(run, ranked)
    members = members_of(ranked)
    sites = sorted({site for of in members.values() for site in of})
    along = _directions(run, sites)
    by_pair: dict[int, list[tuple[int, str, float]]] = {}
    for pair, side, concept, effect in rows.iter_rows():
        by_pair.setdefault(run.pair_set.index[pair], []).append((concept, side, effect))

    def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
        out = []
        for done, place in enumerate(unit):
            texts = clean_runs(run.rm, run.tokens[place], sites)
            start = run.tokens[place].divergence
            for concept, side, effect in by_pair[place]:
                of = members[concept]
                responses = {site: at_site(run.saes[site], texts[side], site, start) for site in of}
                moved = effects_along(run.rm, run.saes, responses, of, along)
                out.append((concept, run.ids[place], side, effect, moved.double().tolist()))
            within(done + 1, len(unit), "other directions")
        return {"directions": pl.DataFrame(out, schema=ROW, orient="row")}

    made = run.on_disk.in_units("directions", key, sorted(by_pair), progress, make) or make([], progress)
    write_table(run.folder / "concepts" / "directions.parquet", direction_null(made["directions"]))
    run.on_disk.drop_parts("directions", key)


def _responses(run: RunData, ranked: pl.DataFrame) -> pl.DataFrame:
    """For each reported concept some of the responses on which it was ablated, one per prompt: concept, pair, side, effect.

    For a concept that is reported for its strong firings these are the responses where it fires hardest.
    """
    is_strong = pl.col("flags").list.contains("strong")
    parts = []
    kinds: dict[Literal["exact", "strong"], pl.Expr] = {"exact": ~is_strong, "strong": is_strong}
    for kind, chosen in kinds.items():
        listed = ranked.filter(chosen)
        rows = run.on_confirm(run.joint_effects(kind)).join(listed.select(feature="concept"), on="feature", how="semi")
        rows = rows.filter("strong") if kind == "strong" else rows
        first = rows.unique(["feature", "prompt"], keep="first", maintain_order=True)
        parts.append(first.filter(pl.int_range(pl.len()).over("feature") < run.config.null_prompts))
    return pl.concat([p.select("pair", "side", concept="feature", effect=pl.col("effect").cast(pl.Float64)) for p in parts])


def _directions(run: RunData, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    """By site of the whole stream random directions, the same at all sites, then differences of the stream there on some
    responses of the fit split: [2 DRAWS, d]."""
    wholes, streams = sorted({whole_site(site) for site in sites}), defaultdict[str, list[torch.Tensor]](list)
    for place in run.pair_set.one_per_prompt(run.of_split("fit"), DRAWS):
        for text in clean_runs(run.rm, run.tokens[place], wholes).values():
            for site in wholes:
                streams[site].append(text.streams[site][run.tokens[place].divergence :].float().cpu())
    seed = run.config.seed
    random = random_directions(run.rm.d_model, DRAWS, seed)
    real = {site: real_directions(torch.cat(streams[site]), DRAWS, seed) for site in wholes}
    fewest = min(map(len, real.values()), default=0)  # as many everywhere
    return {site: torch.cat([random, rows[:fewest]]) for site, rows in real.items()}


def direction_null(table: pl.DataFrame) -> pl.DataFrame:
    """One row per concept, from one row per response with the effect of its ablation and those along other directions."""
    rows = []
    for (concept,), own in table.group_by("concept", maintain_order=True):
        means = np.abs(np.array(own["along"].to_list()).mean(0))
        null = [float(np.percentile(part, PERCENTILE)) if part.size else 0.0 for part in (means[:DRAWS], means[DRAWS:])]
        rows.append((concept, own["effect"].mean(), *null, own.height))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")
