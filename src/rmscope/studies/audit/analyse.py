"""The audit: plant, train, run, score."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from pydantic import ValidationError

from rmscope.errors import InputError
from rmscope.io import Display, NoDisplay, write_json, write_table
from rmscope.model.training.loop import base_of
from rmscope.model.training.recipe import Recipe
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant, read_plants
from rmscope.planted.results import recall_metrics
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.settings import read_settings, read_yaml, validation_sentence
from rmscope.statistics import share
from rmscope.studies.audit import planting
from rmscope.studies.audit.result import Audited, AuditResult, Calibration, ReportedShare
from rmscope.studies.audit.scoring import Scoring
from rmscope.studies.audit.settings import AuditConfig

FRESH_SEED = 7919
"""Added to the audit's seed where held-out prompts are planted: pairs that neither the PM nor the run saw."""


def analyse(config: AuditConfig, display: Display | None = None) -> AuditResult:
    """Plants biases, trains a PM on them, runs the pipeline on it, and counts what it found.

    1. Plant cues into copies of the pairs, and hold out a quarter of the prompts.
    2. Train a PM on the planted pairs.
    3. Run the pipeline. It gets the PM and the file of pairs and nothing else. It makes no ledgers: they are not scored.
    4. Measure each cue on held-out prompts in held-out wordings, and match it against the reported features.
    5. Ablate the reported features again on fresh pairs.
    6. Train SAEs with another seed on the same activations, and look there for what fires like the reported features and
       concepts.
    7. With ``calibrate``: run on two PMs that learned nothing, and match decoy cues.

    Writes ``pairs.jsonl``, ``cues.parquet``, ``replicated.SITE.parquet``, ``audit.json`` and the run to ``config.out``.
    Raises an InputError if a file is missing or malformed, or if the pairs are too few.
    """
    display, started = display or NoDisplay(), time.time()
    plants, seed, recipe, of_run = _read(config)
    _, tokenizer = base_of(recipe)
    bases, held_out = planting.base_pairs(config.pairs, config.limit, config.max_tokens, tokenizer)
    planted = planting.plant_copies(bases, plants, config.copies, seed)
    planting.write_pairs(Path(of_run.data), planted)
    with display.stage("train PM") as progress:
        pm = planting.train_planted_pm(recipe, planted, progress, of_run.device)
    run = Run.create(of_run.model_copy(update={"model": str(pm)}), display).go()
    counts = planting.write_cues(config.out / "cues.parquet", planted, run.rm)
    scoring = Scoring(run, plants, held_out, seed)
    with display.stage("cues") as progress:
        rows = [row.model_copy(update={"planted": counts.get(row.name)}) for row in scoring.score_cues(progress)]
    fresh = planting.plant_copies(held_out, plants, config.copies, seed + FRESH_SEED, held_out=None)
    with display.stage("fresh pairs") as progress:
        replicated = scoring.replicate(fresh, progress)
    for site, table in replicated.items():
        write_table(config.out / f"replicated.{site}.parquet", table)
    with display.stage("second SAEs") as progress:
        stability, concept_stability = scoring.measure_stability(progress)
    audited = Audited(
        **config.model_dump(include={"base", "pairs"}),
        pm=pm.name,
        pm_identity=run.rm.identity,
        seed=seed,
        planted_pairs=len(planted),
        held_out_prompts=len({p.prompt_key for p in held_out}),
        sd_delta=run.sd,
        sites=run.sites,
    )
    result = AuditResult(
        **dict(recall_metrics(rows, replicated)),
        stability=stability,
        concept_stability=concept_stability,
        concepts=run.concepts.filter("reported").height,
        plants=rows,
        audited=audited,
        seconds=round(time.time() - started, 1),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),  # Linux counts it in KB
        replicated=replicated,
    )
    write_json(config.out / "audit.json", result.as_json())
    if config.calibrate:  # two more runs, so what is found is kept before
        result.calibration = _calibrate(recipe, planted, scoring, display)
        result.seconds = round(time.time() - started, 1)
        write_json(config.out / "audit.json", result.as_json())
    return result


def _read(config: AuditConfig) -> tuple[tuple[Plant, ...], int, Recipe, RunConfig]:
    """The plants, the seed, how the PM is trained, and the settings of the run, still without a PM."""
    plants = read_plants(config.plants)
    seed = plants.seed if config.seed is None else config.seed
    changes = read_yaml(config.recipe, "recipe") if config.recipe else {}
    try:
        recipe = Recipe(**{**planting.RECIPE.model_dump(), "base": config.base, "seed": seed, **changes})
    except ValidationError as error:
        raise InputError(validation_sentence(error, Recipe, f" in {config.recipe}")) from error
    changes = read_yaml(config.run, "config") if config.run else {}
    own = {"model": "", "data": str(config.out / "pairs.jsonl"), "out": config.out / "run", "seed": seed, "ledger_pairs": 0}
    sae = {"seed": seed, **changes.get("sae", {})}
    return plants.plants, seed, recipe, read_settings(RunConfig, None, {**own, **changes, "sae": sae})


def _calibrate(recipe: Recipe, planted: list[Pair], scoring: Scoring, display: Display) -> Calibration:
    """What the pipeline reports on a PM of shuffled labels and on one of random weights, and how many decoys it matches."""
    config = scoring.run.config
    with display.stage("train PM") as progress:
        shuffled = planting.train_planted_pm(recipe, planting.shuffle_labels(planted, scoring.seed), progress, config.device)
        folders = {"shuffled": shuffled, "random": planting.make_random_pm(recipe)}
    shares = {}
    for name, pm in folders.items():
        run = Run.create(config.model_copy(update={"model": str(pm), "out": config.out.with_name(name)}), display).go()
        counted = share(sum(s.reported for s in run.evidence.sites), sum(s.frozen for s in run.evidence.sites))
        shares[name] = ReportedShare(**counted.as_dict(), sd_delta=run.sd, concepts=run.concepts.filter("reported").height)
    with display.stage("decoys") as progress:
        return Calibration(decoys=scoring.match_decoys(progress), **shares)
