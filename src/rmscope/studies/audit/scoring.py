"""A finished run against what was planted: one row per plant, replication on fresh pairs, stability, decoys.

The run was told nothing: it read a file of pairs. Cues are measured on prompts that neither the PM nor the run saw.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, silent
from rmscope.model.packing import units
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences, twins
from rmscope.pairs.plants import Plant
from rmscope.planted.diagnosis import Diagnosis, match_null
from rmscope.planted.matching import cue_effect, match_plant, matches
from rmscope.planted.results import KS, Candidate, CueResult
from rmscope.planted.twins import prepare
from rmscope.ranking.candidates import pairs_a_prompt, strongest
from rmscope.ranking.concepts import fire_alike, window_sums
from rmscope.ranking.confirm import BOUND
from rmscope.run.collect import TWINS, best_reported, reported_concepts
from rmscope.run.run import Run
from rmscope.run.text import named_by_text
from rmscope.run.train import train_run_saes
from rmscope.statistics import Figure, share
from rmscope.studies.audit.result import DecoyShare

FRESH_PROMPTS = 24
"""Fresh prompts on which a reported feature is ablated again, one pair each."""
JUDGED = 8
"""A feature that fires on fewer fresh prompts is not judged."""
DECOYS = 100
DECOY_TWINS = 16
"""Twins that a decoy is measured on: a hundred decoys then cost as much as a few plants."""
MARKS = ".,;:!?"


@dataclass
class Scoring:
    """A run, the plants, and the held-out pairs on which the run's findings are tested."""

    run: Run
    plants: Sequence[Plant]
    held_out: Sequence[Pair]
    seed: int

    @cached_property
    def reported(self) -> dict[str, list[Candidate]]:
        """Every reported feature of each site but those of the text's ending; similar ones share a rank."""
        return {site: best_reported(self.run, site, None) for site in self.run.sites}

    def best(self, k: int) -> dict[str, list[Candidate]]:
        """The reported features of the first ``k`` ranks of each site."""
        return {site: [c for c in candidates if c.rank <= k] for site, candidates in self.reported.items()}

    def best_concepts(self, k: int) -> dict[str, list[Candidate]]:
        """The reported concepts of the first ``k`` ranks, by their site."""
        reported = reported_concepts(self.run)
        return {site: [c for c in candidates if c.rank <= k] for site, candidates in reported.items()}

    def score_cues(self, progress: Progress = silent) -> list[CueResult]:
        """One row per plant: its effect, and its match, or why there is none."""
        rows = []
        for i, plant in enumerate(self.plants):
            progress(i, len(self.plants), f"cue {plant.name}")
            rows.append(self.score_cue(plant))
        progress(len(self.plants), len(self.plants), "")
        return rows

    def score_cue(self, plant: Plant) -> CueResult:
        """One plant on held-out prompts. It is matched among the reported concepts of the first 20 ranks, then of the first
        50; then, as it was without concepts, among the best 20 features of each site, and the best 50.
        """
        run, pairs = self.run, twins(self.held_out, plant, TWINS, self.seed)
        prepared = prepare(run.rm, run.saes, pairs, plant)
        given = (run.rm, run.saes, plant, prepared)
        effect = cue_effect(plant, next(iter(prepared.values())), run.sd)
        text = named_by_text(run, plant, pairs)
        size = (effect.ate.value or 0.0) / run.sd
        row = CueResult(**dict(effect), dose=plant.dose, rate=plant.rate, ate_sd=size, text=text)
        if effect.null or plant.dose == 0.5:  # matches of a null that is not clean are told and not counted
            pools = (self.best(KS[-1]), self.best_concepts(KS[-1]))
            row = row.model_copy(update={"matched_by": [m for of in pools for m in match_null(*given, of, run.sd)]})
        if not effect.learned:
            return row.model_copy(update={"why": "not learned"})
        for among in (self.best_concepts, self.best):
            for k in KS:
                match = match_plant(*given, among(k), run.sd, groups=True)
                if match.found:
                    break
            if match.found:
                break
        why = ""
        if not match.found:
            baselines = {site: run.baseline(site) for site in run.sites}
            why = Diagnosis(*given, run.rm.tokenize_all(pairs), self.reported, baselines).reason()
        return row.model_copy(update=dict(match) | {"detail": match.why, "why": why})

    def replicate(self, fresh: Sequence[Pair], progress: Progress = silent) -> dict[str, pl.DataFrame]:
        """Per site, :func:`replication`: reported features are ablated again, on strong firings if reported for those."""
        run, strong = self.run, pl.col("flags").list.contains("strong")
        effect = pl.when(strong).then("strong_effect").otherwise("mean_effect").alias("mean_effect")
        columns = ("feature", effect, strong.alias("strong"))
        listed = {site: run.features(site).filter("reported").select(*columns) for site in run.sites}
        tokens, ids = run.rm.tokenize_all(fresh), [p.id for p in fresh]
        prompts = {p.id: p.prompt_key for p in fresh}
        parts = [tables.firing_table(run.rm, run.saes, tokens, ids, unit) for unit in units(len(ids))]
        firing = {site: pl.concat([part[site] for part in parts]) for site in run.sites}
        ordered = {site: tables.with_order(table, prompts, self.seed) for site, table in firing.items()}
        requests = {site: replication_requests(ordered[site], listed[site]) for site in run.sites}
        wanted = tables.plan(requests, {id_: i for i, id_ in enumerate(ids)})
        ablated = tables.ablation_table(run.rm, run.saes, tokens, ids, wanted, progress)
        return {site: replication(listed[site].drop("strong"), ablated[site], prompts, run.sd) for site in run.sites}

    def measure_stability(self, progress: Progress = silent) -> tuple[Figure, Figure]:
        """The shares of reported features, and of reported concepts, that SAEs of another seed have too.

        A feature or concept is found again where a feature of the other SAE fires alike: their activations over windows of
        the stored text correlate by :data:`~rmscope.ranking.concepts.TOGETHER`.
        """
        run, config = self.run, self.run.config.sae
        if run.other_saes:
            second = run.other_saes[0]
        else:
            next_seed = config.model_copy(update={"seed": config.seed + 1})
            second = train_run_saes(run, next_seed, run.folder / "second", progress)
        features, concepts = list[bool](), list[bool]()
        for site in run.sites:
            own, again = (window_sums(run.store, saes[site], site, range(saes[site].m)) for saes in (run.saes, second))
            features += fire_alike(own[:, [c.feature for c in self.reported[site]]], again).tolist()
            reported = run.concepts.filter(pl.col("reported") & (pl.col("site") == site))
            for members, weights in reported.select("features", "weights").iter_rows():
                concepts += fire_alike(own[:, members] @ np.array(weights)[:, None], again).tolist()
        return share(sum(features), len(features)), share(sum(concepts), len(concepts))

    def match_decoys(self, progress: Progress = silent) -> DecoyShare:
        """The share of decoys that the reported concepts or features match, whether or not the PM learned them."""
        run, words = self.run, list[str]()
        cues = decoys(self.held_out, self.plants, DECOYS, self.seed)
        for i, plant in enumerate(cues):
            prepared = prepare(run.rm, run.saes, twins(self.held_out, plant, DECOY_TWINS, self.seed), plant)
            effect = np.mean([t.delta for t in next(iter(prepared.values()))])
            signed = plant.model_copy(update={"sign": 1 if effect > 0 else -1})  # the sign that makes a match likelier
            if any(matches(run.rm, run.saes, signed, prepared, of) for of in (self.best_concepts(KS[0]), self.best(KS[0]))):
                words.append(plant.texts[0])
            progress(i + 1, len(cues), "decoy cues")
        return DecoyShare(**share(len(words), len(cues)).as_dict(), words=tuple(words))


def decoys(pairs: Sequence[Pair], plants: Sequence[Plant], n: int, seed: int) -> list[Plant]:
    """``n`` words of the pairs' own text that no plant uses, each as a cue of random sign."""
    taken = {word.strip(MARKS).lower() for p in plants for text in p.texts for word in text.split()}
    words = sorted({w.strip(MARKS) for p in pairs for s in sentences(p.chosen) for w in s.split()})
    fit = [w for w in words if w.isalpha() and w.islower() and 4 <= len(w) <= 9 and w not in taken]
    rng = random.Random(f"{seed}/decoys")
    drawn = rng.sample(fit, min(n, len(fit)))
    return [Plant(name=f"decoy-{w}", kind="word", sign=rng.choice((1, -1)), dose=0.5, texts=(w,)) for w in drawn]


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
    prompt = pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt")
    by_prompt = ablated.group_by("feature", prompt).agg(pl.col("effect").cast(pl.Float64).mean())
    by_feature = by_prompt.group_by("feature").agg(pl.col("effect").mean().alias("fresh"), pl.len().alias("prompts"))
    failed = pl.col("fresh") * pl.col("reported").sign() <= BOUND * sd
    return (
        listed.rename({"mean_effect": "reported"})
        .join(by_feature, on="feature", how="left")
        .with_columns(pl.col("prompts").fill_null(0), pl.when(pl.col("prompts") >= JUDGED).then(failed).alias("failed"))
    )
