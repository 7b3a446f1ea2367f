"""The stage of measured values: reported concepts are ablated again, on the measure split.

What a report shows of a concept is from here. The effects that ranked it are too large, since what is large by chance ranks
high. In the same responses, beside the ablation to zero:

- *resampled*: the concept's features take the values that they have in other responses (``effects/resample.py``);
- *other seeds*: what fires like the concept in SAEs of other seeds is ablated (``ranking/counterparts.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.ablation import Response, at_site, clean_runs, entries_of
from rmscope.effects.across import Members, ablate_entries_across, ablate_members, union
from rmscope.effects.resample import DONORS, Donors, resampled_entries
from rmscope.io import Progress, write_table
from rmscope.pairs.pair import SIDES
from rmscope.ranking.candidates import pairs_a_prompt, strongest
from rmscope.ranking.concepts import members_of
from rmscope.ranking.confirm import BOUND
from rmscope.ranking.counterparts import counterparts
from rmscope.run.ablate import concept_firings, feature_firings
from rmscope.run.data import RunData
from rmscope.run.screen import ordered
from rmscope.sae.base import Sae
from rmscope.statistics import FEW, mean_interval

DRAWS = 2
"""Donors of each kind per response."""
OWN = "own"
EFFECTS: dict[str, Any] = {
    "concept": pl.Int32, "pair": pl.String, "side": pl.String, "kind": pl.String, "effect": pl.Float64,
}  # fmt: skip
SCHEMA: dict[str, Any] = {
    "concept": pl.Int32, "measured": pl.Float64, "measured_low": pl.Float64, "measured_high": pl.Float64,
    "n_measured": pl.Int32,
    **{f"by_{donor}{end}": pl.Float64 for donor in DONORS for end in ("", "_low", "_high")},
    "seed_effects": pl.List(pl.Float64), "seeds_held": pl.Int32,
}  # fmt: skip


def measure(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``concepts/measured_effects.parquet``, one row per concept, response and kind of ablation, and
    ``concepts/measured.parquet``, one row per concept: its effect, the resampled ones, those in SAEs of other seeds."""
    ranked = run.ranked_concepts.filter("reported")
    measuring = run.of_split("measure") if ranked.height else []
    firing = feature_firings(run, "measure-firing", measuring, progress, key)
    jobs = _jobs(run, ranked, ordered(run, concept_firings(ranked, firing))) if measuring else {}
    made = {"effects": pl.DataFrame(schema=EFFECTS)}
    if jobs:
        members = members_of(ranked)
        again = counterparts(run.store, run.saes, run.other_saes, ranked)
        donors = Donors(run.store, run.saes, union(list(members.values())))

        def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
            rows = []
            for done, place in enumerate(unit):
                rows += _effects(run, place, jobs[place], members, again, donors)
                within(done + 1, len(unit), "concepts measured")
            return {"effects": pl.DataFrame(rows, schema=EFFECTS, orient="row")}

        made = run.on_disk.in_units("measure", key, sorted(jobs), progress, make)
    write_table(run.folder / "concepts" / "measured_effects.parquet", made["effects"])
    signs = dict(ranked.select("concept", "sign").iter_rows())
    table = measured_values(made["effects"], run.prompts, signs, BOUND * run.sd, [f"seed {s}" for s in run.other_seeds])
    write_table(run.folder / "concepts" / "measured.parquet", table)
    for part in ("measure-firing", "measure"):
        run.on_disk.drop_parts(part, key)


def _jobs(run: RunData, ranked: pl.DataFrame, fires: pl.DataFrame) -> dict[int, dict[str, list[int]]]:
    """By pair and side the concepts that are ablated: where they fire; those with the flag ``strong`` where they fire
    hardest."""
    is_strong = pl.col("flags").list.contains("strong")
    plain, strong = (ranked.filter(chosen)["concept"].to_list() for chosen in (~is_strong, is_strong))
    rows = pairs_a_prompt(fires, plain, run.config.measure_prompts)
    hardest = strongest(fires, strong, run.config.measure_prompts, FEW).filter("strong")
    jobs: dict[int, dict[str, list[int]]] = {}
    for pair, side, concept in pl.concat([rows, hardest.select(rows.columns)]).select("pair", "side", "feature").iter_rows():
        jobs.setdefault(run.pair_set.index[pair], {}).setdefault(side, []).append(concept)
    return jobs


def _effects(
    run: RunData,
    place: int,
    sides: Mapping[str, list[int]],
    members: Mapping[int, Members],
    again: list[dict[int, Members]],
    donors: Donors,
) -> list[tuple[int, str, str, str, float]]:
    """The rows of one pair."""
    rows = []
    texts = clean_runs(run.rm, run.tokens[place], run.sites, list(sides))
    for side, concepts in sides.items():

        def responses(saes: Mapping[str, Sae], side: str = side) -> dict[str, Response]:
            return {s: at_site(sae, texts[side], s, run.tokens[place].divergence) for s, sae in saes.items()}

        own, rng = responses(run.saes), np.random.default_rng([run.config.seed, place, SIDES.index(side)])
        kinds = [OWN, *(f"by_{donor}" for donor in DONORS for _ in range(DRAWS))]
        entries = []
        for concept in concepts:
            of = members[concept]
            entries.append({site: entries_of(own[site].active, features) for site, features in of.items()})
            entries += [resampled_entries(donors, donor, own, of, rng) for donor in DONORS for _ in range(DRAWS)]
        effects = ablate_entries_across(run.rm, run.saes, own, entries).unflatten(0, (len(concepts), len(kinds)))
        for concept, row in zip(concepts, effects.double().tolist(), strict=True):
            rows += [(concept, run.ids[place], side, kind, effect) for kind, effect in zip(kinds, row, strict=True)]
        for seed, saes, found in zip(run.other_seeds, run.other_saes, again, strict=True):
            if here := [concept for concept in concepts if found[concept]]:
                moved = ablate_members(run.rm, saes, responses(saes), [found[c] for c in here]).double().tolist()
                rows += [(c, run.ids[place], side, f"seed {seed}", e) for c, e in zip(here, moved, strict=True)]
    return rows


def measured_values(
    effects: pl.DataFrame, prompts: Mapping[str, str], signs: Mapping[int, int], bound: float, seeds: list[str]
) -> pl.DataFrame:
    """One row per concept, from one row per concept, response and kind of ablation.

    Means are over prompts, with the 95 % interval; null on fewer than :data:`~rmscope.statistics.FEW` prompts.
    ``seed_effects`` has one mean per other seed, null where nothing fires alike. ``seeds_held`` counts the dictionaries, the
    run's own among them, in which the effect has the concept's sign and is above ``bound`` (in units of reward).
    """
    prompt = pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt")
    by_prompt = effects.group_by("concept", "kind", prompt, maintain_order=True).agg(pl.col("effect").mean())
    found = {key: part["effect"].to_numpy() for key, part in by_prompt.partition_by("concept", "kind", as_dict=True).items()}
    rows = []
    for concept, sign in signs.items():
        values = {kind: found.get((concept, kind), np.zeros(0)) for kind in (OWN, *(f"by_{d}" for d in DONORS), *seeds)}
        enough = {kind: value.size >= FEW for kind, value in values.items()}
        row: dict[str, Any] = {"concept": concept, "n_measured": values[OWN].size}
        for kind, name in ((OWN, "measured"), *((f"by_{d}", f"by_{d}") for d in DONORS)):
            if enough[kind]:
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), _mean(values[kind]), strict=True))
        row["seed_effects"] = [float(values[seed].mean()) if enough[seed] else None for seed in seeds]
        means = [row.get("measured"), *row["seed_effects"]]
        row["seeds_held"] = sum(mean is not None and sign * mean > bound for mean in means)
        rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMA)


def _mean(values: Any) -> tuple[float, float, float]:
    return float(values.mean()), *mean_interval(values)
