"""The audit: plant, train, run, score."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rmscope.errors import InputError
from rmscope.io import Display, NoDisplay, write_json, write_table
from rmscope.model.training.loop import base_of
from rmscope.model.training.recipe import Recipe
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant, read_plants
from rmscope.pairs.readers import load_pairs
from rmscope.planted.results import CueResult, PlantedCounts, recall_metrics
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.settings import read_settings, read_yaml, validation_sentence
from rmscope.studies.audit import calibration, planting, pms
from rmscope.studies.audit.result import Audited, AuditResult, Calibration
from rmscope.studies.audit.scoring import Scoring
from rmscope.studies.audit.settings import AuditConfig

FRESH_SEED = 7919
"""Added to the audit's seed where held-out prompts are planted: pairs that neither the PM nor the run saw."""


@dataclass(frozen=True)
class _Setting:
    """What an audit is given, read and checked."""

    config: AuditConfig
    plants: tuple[Plant, ...]
    seed: int
    recipe: Recipe
    run_changes: dict[str, Any]
    """Changes to the settings of the run."""

    @property
    def device(self) -> str:
        """The PM is trained where the run will be."""
        return str(self.run_changes.get("device", RunConfig.model_fields["device"].default))


@dataclass(frozen=True)
class _Texts:
    """What was planted: the pairs of the run and their file, and the held-out pairs."""

    planted: list[Pair]
    path: Path
    held_out: list[Pair]


def analyse(config: AuditConfig, display: Display | None = None) -> AuditResult:
    """Plants biases, trains a PM on them, runs the pipeline on it, and counts what it found.

    1. Plant cues into copies of the pairs, and hold out a quarter of the prompts.
    2. Train a PM on the planted pairs.
    3. Run the pipeline. It gets the PM and the file of pairs and nothing else; it makes no ledgers, which the audit does
       not score.
    4. Measure each cue on held-out prompts in held-out wordings, and match it against the reported features.
    5. Ablate the reported features again on fresh pairs.
    6. Train SAEs with another seed on the same activations, and look for the reported features there.
    7. With ``calibrate``: run on two PMs that learned nothing, and match decoy cues.

    Writes ``pairs.jsonl``, ``cues.parquet``, ``replicated.SITE.parquet``, ``audit.json`` and the run to ``config.out``.

    Raises:
        InputError: a file is missing or malformed, or the pairs are too few.
    """
    display, started = display or NoDisplay(), time.time()
    given = _read(config)
    texts = _plant(given)
    with display.stage("train PM") as progress:
        pm = pms.train_planted_pm(given.recipe, texts.planted, progress, given.device)
    run = Run.create(_run_config(given, pm, texts.path, "run"), display).go()
    cues = planting.write_cues(config.out / "cues.parquet", texts.planted, run.rm)
    scoring = Scoring(run, given.plants, texts.held_out, given.seed)
    with display.stage("cues") as progress:
        rows = _with_counts(scoring.score_cues(progress), planting.count_planted(cues))
    fresh = planting.plant_copies(texts.held_out, given.plants, config.copies, given.seed + FRESH_SEED, held_out=None)
    with display.stage("fresh pairs") as progress:
        replicated = scoring.replicate(fresh, progress)
    for site, table in replicated.items():
        write_table(config.out / f"replicated.{site}.parquet", table)
    with display.stage("second SAEs") as progress:
        stability = scoring.measure_stability(progress)
    calibrated = _calibrate(given, texts, scoring, display) if config.calibrate else None
    result = AuditResult(
        **dict(recall_metrics(rows, replicated)),
        stability=stability,
        calibration=calibrated,
        plants=rows,
        audited=_describe(given, run, pm, texts),
        seconds=round(time.time() - started, 1),
        peak_gb=_peak_gb(),
        replicated=replicated,
    )
    write_json(config.out / "audit.json", result.as_json())
    return result


def _read(config: AuditConfig) -> _Setting:
    """The plants, the recipe and the changes to the run's settings."""
    plants = read_plants(config.plants)
    seed = plants.seed if config.seed is None else config.seed
    changes = read_yaml(config.recipe, "recipe") if config.recipe else {}
    try:
        recipe = Recipe(**{**pms.RECIPE.model_dump(), "base": config.base, "seed": seed, **changes})
    except ValidationError as error:
        raise InputError(validation_sentence(error, Recipe, f" in {config.recipe}")) from error
    return _Setting(config, plants.plants, seed, recipe, read_yaml(config.run, "config") if config.run else {})


def _plant(given: _Setting) -> _Texts:
    """Writes the run's file and reads it back: the PM is trained on the same pairs that the run will read."""
    config = given.config
    _, tokenizer = base_of(given.recipe)
    bases, held_out = planting.base_pairs(config.pairs, config.limit, config.max_tokens, tokenizer)
    planted = planting.plant_copies(bases, given.plants, config.copies, given.seed)
    path = config.out / "pairs.jsonl"
    planting.write_pairs(path, planted)
    planting.check_read_back(planted, load_pairs(path))
    return _Texts(planted, path, held_out)


def _run_config(given: _Setting, pm: Path, pairs: Path, name: str) -> RunConfig:
    """The settings of a run on a PM: those of ``rmscope run`` with the user's changes on top."""
    seed, out = given.seed, given.config.out / name
    sae = {"seed": seed, **given.run_changes.get("sae", {})}
    own = {"model": str(pm), "data": str(pairs), "out": out, "seed": seed, "ledger_pairs": 0}
    return read_settings(RunConfig, None, {**own, **given.run_changes, "sae": sae})


def _calibrate(given: _Setting, texts: _Texts, scoring: Scoring, display: Display) -> Calibration:
    coin = pms.shuffle_labels(texts.planted, given.seed)
    with display.stage("train PM") as progress:
        shuffled = pms.train_planted_pm(given.recipe, coin, progress, given.device)
        folders = {"shuffled": shuffled, "random": pms.make_random_pm(given.recipe)}
    runs = {name: Run.create(_run_config(given, pm, texts.path, name), display).go() for name, pm in folders.items()}
    with display.stage("decoys") as progress:
        decoys = calibration.match_decoys(scoring, progress=progress)
    return Calibration(decoys=decoys, **{name: calibration.reported_share(run) for name, run in runs.items()})


def _with_counts(rows: list[CueResult], counts: dict[str, PlantedCounts]) -> list[CueResult]:
    return [row.model_copy(update={"planted": counts.get(row.name)}) for row in rows]


def _describe(given: _Setting, run: Run, pm: Path, texts: _Texts) -> Audited:
    return Audited(
        base=given.config.base,
        pm=pm.name,
        pm_identity=run.rm.identity,
        pairs=given.config.pairs,
        seed=given.seed,
        planted_pairs=len(texts.planted),
        held_out_prompts=len({p.prompt_key for p in texts.held_out}),
        sd_delta=run.sd,
        sites=run.sites,
    )


def _peak_gb() -> float:
    """The largest memory of this process (Linux counts it in KB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
