"""A finished run against what was planted: a row a plant, replication on fresh pairs, stability.

The run was told nothing: it read a file of pairs. Cues are measured on prompts that neither the PM nor the run saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, silent
from rmscope.model.packing import units
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.diagnosis import Diagnosis, null_reported
from rmscope.planted.matching import cue_effect, match_plant
from rmscope.planted.recall_metrics import KS, found_again, share
from rmscope.planted.twins import prepare
from rmscope.ranking.ranking import BOUND, pairs_a_prompt, strongest
from rmscope.run.evidence import TWINS, candidates_of
from rmscope.run.results import Results

FRESH_PROMPTS = 24
"""Fresh prompts on which a reported feature is ablated again, one pair each."""
JUDGED = 8
"""A feature that fires on fewer fresh prompts is not judged."""
SECOND_SEED = 1
"""Added to the SAEs' seed for the second training."""

Candidates = Mapping[str, list[dict[str, Any]]]


@dataclass
class Scoring:
    """A run, and the held-out pairs that its findings are held to."""

    run: Results
    plants: Sequence[Plant]
    held_out: Sequence[Pair]
    seed: int
    n_twins: int = TWINS

    @cached_property
    def reported(self) -> Candidates:
        """Every reported feature of each site but those of the text's ending, ranked with like ones merged."""
        return {site: candidates_of(self.run, site, None) for site in self.run.sites}

    def within(self, k: int) -> Candidates:
        return {site: [row for row in rows if row["rank"] <= k] for site, rows in self.reported.items()}

    def rows(self, progress: Progress = silent) -> list[dict[str, Any]]:
        """A row a plant: its effect, its match, or why there is none."""
        out = []
        for i, plant in enumerate(self.plants):
            progress(i, len(self.plants), f"cue {plant.name}")
            out.append(self.row(plant))
        progress(len(self.plants), len(self.plants), "")
        return out

    def row(self, plant: Plant) -> dict[str, Any]:
        run, made = self.run, twins(self.held_out, plant, self.n_twins, self.seed)
        prepared = prepare(run.rm, run.saes, made, plant)
        row = cue_effect(plant, next(iter(prepared.values())), run.sd) | {
            "dose": plant.dose, "rate": plant.rate, "ate_sd": None, "matched_by": [],
            "found": False, "hit": "none", "site": None, "features": [], "rank": None, "f1": None, "mediated": None,
            "group": None, "why": "", "detail": "",
        }  # fmt: skip
        row["ate_sd"] = row["ate"]["value"] / run.sd
        if row["null"] or plant.dose == 0.5:  # a null that is not clean is no false discovery; what matches it is told
            row["matched_by"] = null_reported(run.rm, run.saes, plant, prepared, self.within(KS[-1]), run.sd)
        if not row["learned"]:
            return row | {"why": "not learned"}
        for k in KS:
            found = match_plant(run.rm, run.saes, plant, prepared, self.within(k), run.sd, groups=True)
            if found["found"] or k == KS[-1]:
                break
        row |= {"detail": found.pop("why"), **found}
        if row["found"]:
            return row | {"why": ""}
        baselines = {site: run.baseline(site) for site in run.sites}
        tokens = run.rm.tokenize_all(made)
        missed = Diagnosis(run.rm, run.saes, plant, prepared, tokens, self.reported, baselines)
        return row | {"why": missed.reason()}

    def replicated(self, fresh: Sequence[Pair], progress: Progress = silent) -> dict[str, pl.DataFrame]:
        """Every reported feature ablated again on fresh pairs: feature, mean effect, prompts, and whether it failed.

        It fails where its mean effect in the reported sign is not above the bound of a report, .05 SD(Δr); it is not judged
        (null) where it fires on fewer than :data:`JUDGED` prompts. What was reported for its strong firings is held to them.
        """
        run = self.run
        features = {site: pl.read_parquet(run.folder / "features" / f"{site}.parquet") for site in run.sites}
        strong = pl.col("flags").list.contains("strong")
        effect = pl.when(strong).then("strong_effect").otherwise("mean_effect").alias("mean_effect")
        listed = {
            s: table.filter("reported").select("feature", effect, strong.alias("strong")) for s, table in features.items()
        }
        tokens, ids = run.rm.tokenize_all(fresh), [p.id for p in fresh]
        prompts = {p.id: str(p.meta["group"]) for p in fresh}
        firing = self._firing(tokens, ids)
        asked = {}
        for site, table in firing.items():
            ordered = tables.with_order(table, prompts, self.seed)
            asked[site] = ablated_again(ordered, listed[site])
        wanted = tables.plan(asked, {id_: i for i, id_ in enumerate(ids)})
        ablated = tables.ablation_table(run.rm, run.saes, tokens, ids, wanted, progress)
        return {site: replication(listed[site].drop("strong"), ablated[site], prompts, run.sd) for site in run.sites}

    def _firing(self, tokens: Any, ids: list[str]) -> dict[str, pl.DataFrame]:
        parts = [tables.firing_table(self.run.rm, self.run.saes, tokens, ids, unit) for unit in units(len(ids))]
        return {site: pl.concat([part[site] for part in parts]) for site in self.run.sites}

    def stability(self, progress: Progress = silent) -> dict[str, Any]:
        """The share of reported features that SAEs of another seed, trained on the same activations, find again."""
        run, config = self.run, self.run.config.sae
        other = config.model_copy(update={"seed": config.seed + SECOND_SEED})
        again = run.trained(other, run.folder / "second", progress)
        found = [
            hit
            for site in run.sites
            for hit in found_again(run.saes[site], again[site], [row["feature"] for row in self.reported[site]])
        ]
        return share(sum(found), len(found))


def ablated_again(ordered: pl.DataFrame, listed: pl.DataFrame) -> pl.DataFrame:
    """Where listed features (feature, strong) are ablated on fresh pairs: as in a run, where they fire or fire hardest."""
    often, hard = (listed.filter(pl.col("strong") == strong)["feature"].to_list() for strong in (False, True))
    rows = pairs_a_prompt(ordered, often, FRESH_PROMPTS)
    hardest = strongest(ordered, hard, FRESH_PROMPTS, JUDGED).filter("strong")
    return pl.concat([rows, hardest.select(rows.columns)])


def replication(listed: pl.DataFrame, ablated: pl.DataFrame, prompts: Mapping[str, str], sd: float) -> pl.DataFrame:
    """A row a listed feature: feature, reported (mean effect), fresh (the same on fresh pairs), prompts, failed."""
    by_prompt = (
        ablated.with_columns(pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt"))
        .group_by("feature", "prompt")
        .agg(pl.col("effect").cast(pl.Float64).mean())
        .group_by("feature")
        .agg(pl.col("effect").mean().alias("fresh"), pl.len().alias("prompts"))
    )
    signed = pl.col("fresh") * pl.col("reported").sign()
    judged = pl.col("prompts") >= JUDGED
    return (
        listed.rename({"mean_effect": "reported"})
        .join(by_prompt, on="feature", how="left")
        .with_columns(pl.col("prompts").fill_null(0))
        .with_columns(pl.when(judged).then(signed <= BOUND * sd).alias("failed"))
    )
