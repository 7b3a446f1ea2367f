"""A finished run against what was planted: one row per plant, replication on fresh pairs, stability.

The run was told nothing: it read a file of pairs. Cues are measured on prompts that neither the PM nor the run saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, silent
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.diagnosis import Diagnosis, match_null
from rmscope.planted.matching import cue_effect, match_plant
from rmscope.planted.results import KS, Candidate, CueResult
from rmscope.planted.twins import prepare
from rmscope.ranking.candidates import pairs_a_prompt, strongest
from rmscope.ranking.confirm import BOUND
from rmscope.ranking.similarity import found_again
from rmscope.run.collect import TWINS, best_reported
from rmscope.run.run import Run
from rmscope.run.stages import train_run_saes
from rmscope.statistics import Figure, share

FRESH_PROMPTS = 24
"""Fresh prompts on which a reported feature is ablated again, one pair each."""
JUDGED = 8
"""A feature that fires on fewer fresh prompts is not judged."""
SECOND_SEED = 1
"""Added to the SAEs' seed for the second training."""


@dataclass
class Scoring:
    """A run, the plants, and the held-out pairs on which the run's findings are tested."""

    run: Run
    plants: Sequence[Plant]
    held_out: Sequence[Pair]
    seed: int
    n_twins: int = TWINS

    @cached_property
    def reported(self) -> dict[str, list[Candidate]]:
        """Every reported feature of each site but those of the text's ending; similar ones share a rank."""
        return {site: best_reported(self.run, site, None) for site in self.run.sites}

    def best(self, k: int) -> dict[str, list[Candidate]]:
        """The reported features of the first ``k`` ranks of each site."""
        return {site: [c for c in candidates if c.rank <= k] for site, candidates in self.reported.items()}

    def score_cues(self, progress: Progress = silent) -> list[CueResult]:
        """One row per plant: its effect, and its match, or why there is none."""
        rows = []
        for i, plant in enumerate(self.plants):
            progress(i, len(self.plants), f"cue {plant.name}")
            rows.append(self.score_cue(plant))
        progress(len(self.plants), len(self.plants), "")
        return rows

    def score_cue(self, plant: Plant) -> CueResult:
        """One plant on held-out prompts. It is matched among the best 20 features of each site, then among the best 50."""
        run, pairs = self.run, twins(self.held_out, plant, self.n_twins, self.seed)
        prepared = prepare(run.rm, run.saes, pairs, plant)
        effect = cue_effect(plant, next(iter(prepared.values())), run.sd)
        row = CueResult(
            **dict(effect),
            dose=plant.dose,
            rate=plant.rate,
            ate_sd=(effect.ate.value or 0.0) / run.sd,
        )
        if effect.null or plant.dose == 0.5:  # matches of a null that is not clean are told and not counted
            matched_by = match_null(run.rm, run.saes, plant, prepared, self.best(KS[-1]), run.sd)
            row = row.model_copy(update={"matched_by": matched_by})
        if not effect.learned:
            return row.model_copy(update={"why": "not learned"})
        for k in KS:
            match = match_plant(run.rm, run.saes, plant, prepared, self.best(k), run.sd, groups=True)
            if match.found:
                break
        row = row.model_copy(update=dict(match) | {"detail": match.why, "why": ""})
        if row.found:
            return row
        baselines = {site: run.baseline(site) for site in run.sites}
        tokens = run.rm.tokenize_all(pairs)
        diagnosis = Diagnosis(run.rm, run.saes, plant, prepared, tokens, self.reported, baselines)
        return row.model_copy(update={"why": diagnosis.reason()})

    def replicate(self, fresh: Sequence[Pair], progress: Progress = silent) -> dict[str, pl.DataFrame]:
        """Ablates every reported feature again on fresh pairs; per site the table of :func:`replication`.

        A feature that was reported for its strong firings is ablated on those.
        """
        run = self.run
        strong = pl.col("flags").list.contains("strong")
        effect = pl.when(strong).then("strong_effect").otherwise("mean_effect").alias("mean_effect")
        listed = {
            site: run.features(site).filter("reported").select("feature", effect, strong.alias("strong"))
            for site in run.sites
        }
        tokens, ids = run.rm.tokenize_all(fresh), [p.id for p in fresh]
        prompts = {p.id: p.prompt_key for p in fresh}
        requests = {
            site: replication_requests(tables.with_order(table, prompts, self.seed), listed[site])
            for site, table in self._firing(tokens, ids).items()
        }
        wanted = tables.plan(requests, {id_: i for i, id_ in enumerate(ids)})
        ablated = tables.ablation_table(run.rm, run.saes, tokens, ids, wanted, progress)
        return {site: replication(listed[site].drop("strong"), ablated[site], prompts, run.sd) for site in run.sites}

    def _firing(self, tokens: Sequence[PairTokens], ids: Sequence[str]) -> dict[str, pl.DataFrame]:
        parts = [tables.firing_table(self.run.rm, self.run.saes, tokens, ids, unit) for unit in units(len(ids))]
        return {site: pl.concat([part[site] for part in parts]) for site in self.run.sites}

    def measure_stability(self, progress: Progress = silent) -> Figure:
        """The share of reported features that SAEs of another seed, trained on the same activations, have too."""
        run, config = self.run, self.run.config.sae
        other = config.model_copy(update={"seed": config.seed + SECOND_SEED})
        second = train_run_saes(run, other, run.folder / "second", progress)
        hits = [
            hit
            for site in run.sites
            for hit in found_again(run.saes[site], second[site], [c.feature for c in self.reported[site]])
        ]
        return share(sum(hits), len(hits))


def replication_requests(ordered: pl.DataFrame, listed: pl.DataFrame) -> pl.DataFrame:
    """Where listed features (feature, strong) are ablated on fresh pairs: where they fire, or where they fire hardest."""
    plain, strong = (listed.filter(pl.col("strong") == value)["feature"].to_list() for value in (False, True))
    rows = pairs_a_prompt(ordered, plain, FRESH_PROMPTS)
    hardest = strongest(ordered, strong, FRESH_PROMPTS, JUDGED).filter("strong")
    return pl.concat([rows, hardest.select(rows.columns)])


def replication(listed: pl.DataFrame, ablated: pl.DataFrame, prompts: Mapping[str, str], sd: float) -> pl.DataFrame:
    """One row per listed feature: feature, reported (mean effect), fresh (the same on fresh pairs), prompts, failed.

    A feature fails where its fresh mean effect, in the reported sign, is not above the bound of a report, .05 SD(Δr).
    ``failed`` is null where it fires on fewer than :data:`JUDGED` prompts.
    """
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
